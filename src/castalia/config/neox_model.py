"""Rules for the GPT-NeoX options that shape the model: widths, norms, positions, attention."""

from castalia.config.neox_attention import SPARSE, attention_kinds, has_attention, layer_kinds
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong

INITS = (
    "normal",
    "scaled_normal",
    "single_residual_scaled_normal",
    "small_init",
    "wang_init",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
)
PLAIN = ("gelu", "relu", "softsign", "swish", "mish", "silu")
GATED = ("geglu", "reglu", "swiglu", "bilinear", "glu")
POSITIONS = ("learned", "rotary", "sinusoidal", "rpe", "alibi", "none")
NORMS = {
    "layernorm": ("layernorm", "layernorm_epsilon"),
    "te_layernorm": ("layernorm", "layernorm_epsilon"),
    "non_parametric_layernorm": ("non_parametric_layernorm", "layernorm_epsilon"),
    "rmsnorm": ("rmsnorm", "rms_norm_epsilon"),
    "te_rmsnorm": ("rmsnorm", "rms_norm_epsilon"),
    "scalenorm": ("scalenorm", "scalenorm_epsilon"),
}
"""GPT-NeoX's norm -> ours, and the option that has its epsilon."""
EPSILONS = ("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon")
OLD_MULTIPLE = 256
"""Unit of the width of LLaMA's MLP in GPT-NeoX before September 2024."""


def mlp_width(o: NeoxOptions, out: NeoxReading) -> None:
    """The width inside the MLP, which GPT-NeoX computes from up to four options."""
    if o.has("intermediate_size") and o.has("expansion_factor"):
        wrong(out, "intermediate_size and expansion_factor are both given; keep one")
    # Over a preset with a gated MLP the file's number alone does not say which width is meant.
    if not o.has("hidden_size") or o["activation"] not in (*PLAIN, *GATED):
        return
    if not has_attention(o):
        return
    if o["te_layernorm_mlp"]:
        width: int | None = named_width(o)
    elif o["activation"] in GATED:
        width = gated_width(o, out)
    else:
        width = plain_width(o, out)
    # The default of a plain MLP stays null, so that the width follows hidden_size in an override.
    if width is not None and (o["activation"] in GATED or width != 4 * o["hidden_size"]):
        o.put(out, "model.intermediate_size", width, "intermediate_size", "expansion_factor")


def named_width(o: NeoxOptions) -> int:
    """intermediate_size, or int(expansion_factor * hidden_size), or 4 * hidden_size."""
    return int(o["intermediate_size"] or (o["expansion_factor"] or 4) * o["hidden_size"])


def rounded_up(number: int, unit: int) -> int:
    """The smallest multiple of the unit from the number on."""
    return -(-number // unit) * unit


def plain_width(o: NeoxOptions, out: NeoxReading) -> int | None:
    """Width of an MLP of two matrices.

    Source  GPT-NeoX, megatron/model/transformer.py, ParallelMLP: the outputs of the first are
            rounded up to 2 * mlp_multiple_of, the inputs of the second to mlp_multiple_of.
    """
    unit = max(1, o["mlp_multiple_of"])
    width = named_width(o)
    outputs = rounded_up(width, 2 * unit)
    inputs = rounded_up(width, unit)
    if outputs != inputs:
        wrong(
            out,
            f"intermediate_size {width} is not divisible by 2 * mlp_multiple_of = {2 * unit}:"
            f" GPT-NeoX gives the first matrix {outputs} outputs and the second {inputs} inputs",
            "model.intermediate_size",
        )
        return None
    return outputs


def gated_width(o: NeoxOptions, out: NeoxReading) -> int | None:
    """Width of a gated MLP, each of whose halves has a third of intermediate_size.

    Source  GPT-NeoX, megatron/model/transformer.py, ParallelMLP: with F = intermediate_size and G =
            int(2F / 3), the first matrix has G outputs rounded up to 2 * mlp_multiple_of, half of
            them the gate; the second has G // 2 inputs rounded up to mlp_multiple_of.
    """
    unit = max(1, o["mlp_multiple_of"])
    named = named_width(o)
    both = int(named * 2 / 3)
    half = rounded_up(both, 2 * unit) // 2
    inputs = rounded_up(both // 2, unit)
    if half != inputs:
        return width_of_before(o, out, half, inputs)
    how = f"{o['activation']} with intermediate_size {named}"
    if not o.has("intermediate_size"):
        how = f"{o['activation']} without intermediate_size"
    text = f"model.intermediate_size is {half}: {how} has halves of that width in GPT-NeoX"
    before = rounded_up(int(8 * o["hidden_size"] / 3), OLD_MULTIPLE)
    if not o.has("intermediate_size") and not o.has("expansion_factor") and before != half:
        text += (
            f"; before September 2024 they had {before}, as LLaMA has:"
            f" model.intermediate_size={before}"
        )
    note(out, text, "model.intermediate_size")
    return half


def width_of_before(o: NeoxOptions, out: NeoxReading, half: int, inputs: int) -> int | None:
    """The width of a file that GPT-NeoX's rule of today cannot build, such as mistral/7B.yml.

    Source  GPT-NeoX before 0d4bdb96 (September 2024), LLaMAParallelMLP: intermediate_size is the
            width itself, and the MLP has no biases.
    """
    problem = (
        f"{o['activation']} with {named_width(o)} gives the first matrix twice {half} outputs and"
        f" the second {inputs} inputs"
    )
    if not o.has("intermediate_size"):
        wrong(out, f"{problem}; give intermediate_size", "model.intermediate_size")
        return None
    width = int(o["intermediate_size"])
    text = (
        f"{problem}, which GPT-NeoX cannot build; intermediate_size {width} is read as GPT-NeoX did"
        " before September 2024, as the width itself"
    )
    if not o.has("use_bias_in_mlp"):
        text += ", without biases in the MLP"
        o.put(out, "model.mlp_bias", False, "intermediate_size")
    note(out, text, "model.intermediate_size")
    return width


def activation(o: NeoxOptions, out: NeoxReading) -> None:
    """bias_gelu_fusion and Transformer Engine compute GELU's tanh form; otherwise GELU is exact."""
    name = o["activation"]
    if name not in (*PLAIN, *GATED):
        menu = ", ".join((*PLAIN, *GATED))
        wrong(out, f"unknown activation {name!r}; choose one of {menu}", "model.activation")
        return
    fused = ("bias_gelu_fusion",) if name == "gelu" else ()
    if (o["bias_gelu_fusion"] and fused) or (o["te_layernorm_mlp"] and name in ("gelu", "geglu")):
        name += "_tanh"
    o.put(out, "model.activation", name, "activation", *fused)


def biases(o: NeoxOptions, out: NeoxReading) -> None:
    """Biases of a LLaMA that its file does not name, and those of Transformer Engine."""
    if o["te_layernorm_mlp"] and not o["use_bias_in_mlp"]:
        o.put(out, "model.mlp_bias", True, "te_layernorm_mlp")
        note(
            out,
            "te_layernorm_mlp has biases whatever use_bias_in_mlp says; model.mlp_bias=false"
            " leaves them out",
            "model.mlp_bias",
        )
        return
    silent = o.complete and not o.has("use_bias_in_mlp")
    if is_llama(o) and silent and out.values["model"]["mlp_bias"]:
        note(
            out,
            "use_bias_in_mlp is not given and GPT-NeoX's default is true, though LLaMA's MLP has no"
            " biases: model.mlp_bias=false",
            "model.mlp_bias",
        )


def start_weights(o: NeoxOptions, out: NeoxReading) -> None:
    """The two initializations; their defaults are normal and scaled_normal."""
    for name in ("init_method", "output_layer_init_method"):
        if o[name] not in INITS:
            wrong(out, f"unknown {name} {o[name]!r}; choose one of {', '.join(INITS)}")
        else:
            o.put(out, f"model.{name}", o[name], name)


def tying(o: NeoxOptions, out: NeoxReading) -> None:
    """Tied unless no_weight_tying."""
    o.put(out, "model.tie_word_embeddings", not o["no_weight_tying"], "no_weight_tying")


def norms(o: NeoxOptions, out: NeoxReading) -> None:
    """The norm, and of the three epsilons the one that it has."""
    name = o["norm"]
    if name not in NORMS:
        wrong(out, f"unknown norm {name!r}; choose one of {', '.join(NORMS)}", "model.norm")
        return
    ours, epsilon = NORMS[name]
    o.put(out, "model.norm", ours, "norm")
    if not o.complete and not o.has("norm"):
        # The norm is the preset's, and so is the epsilon that the file names.
        epsilon = next((key for key in EPSILONS if o.has(key)), epsilon)
    o.put(out, "model.layernorm_epsilon", o[epsilon], epsilon, "norm")
    for key in EPSILONS:
        if key != epsilon and o.has(key):
            out.ignored.setdefault("epsilon of another norm", []).append(key)


def dropout(o: NeoxOptions, out: NeoxReading) -> None:
    """Both shares; 0 is the default of every family."""
    for name in ("hidden_dropout", "attention_dropout"):
        if o[name]:
            o.put(out, f"model.{name}", o[name], name)


def positions(o: NeoxOptions, out: NeoxReading) -> None:
    """pos_emb, with the options of the kind that it names."""
    kind = o["pos_emb"]
    if kind not in POSITIONS:
        wrong(out, f"unknown pos_emb {kind!r}; choose one of {', '.join(POSITIONS)}")
        return
    o.put(out, "model.pos_emb", kind, "pos_emb")
    own = {
        "learned": {"opt_pos_emb_offset": "learned_offset"},
        "rpe": {"rpe_num_buckets": "rpe_num_buckets", "rpe_max_distance": "rpe_max_distance"},
    }
    for named, keys in own.items():
        for option, key in keys.items():
            if kind == named:
                o.put(out, f"model.{key}", o[option], option)
            elif o.has(option):
                out.ignored.setdefault("belongs to another pos_emb", []).append(option)


def residual(o: NeoxOptions, out: NeoxReading) -> None:
    """gpt_j_tied means one norm for both branches of gpt_j_residual."""
    shared = o["gpt_j_tied"] and o["gpt_j_residual"]
    if o["te_layernorm_mlp"] and shared:
        # The norm is part of that layer, which gets the residual as it is.
        note(
            out,
            "gpt_j_tied has no effect with te_layernorm_mlp, which has a norm of its own",
            "model.shared_norm",
        )
        shared = False
    if o["gpt_j_tied"] and not o["gpt_j_residual"] and o.complete:
        out.ignored.setdefault("without gpt_j_residual each branch has its norm", []).append(
            "gpt_j_tied"
        )
    o.put(out, "model.shared_norm", shared, "gpt_j_tied")


def queries_and_keys(o: NeoxOptions, out: NeoxReading) -> None:
    """The norm of queries and keys, fewer heads of keys, and what a token sees of the row."""
    qk_norm = "neox" if o["use_qk_layernorm"] else "none"
    o.put(out, "model.qk_norm", qk_norm, "use_qk_layernorm")
    if o.has("num_kv_heads"):
        o.put(out, "model.num_kv_heads", o["num_kv_heads"], "num_kv_heads")
    grouped = o.has("attention_type") and o["attention_type"] == "groupedquery"
    if grouped and o.has("num_kv_heads"):
        note(
            out,
            "attention_type is not an option of GPT-NeoX, which would refuse the file; num_kv_heads"
            f" {o['num_kv_heads']} says the same",
        )
    elif o.has("attention_type"):
        wrong(
            out,
            f"attention_type {o['attention_type']!r} is not an option of GPT-NeoX; write"
            " num_kv_heads, the number of heads of keys",
            "model.num_kv_heads",
        )


def attention(o: NeoxOptions, out: NeoxReading) -> None:
    """attention_config, sparsity_config and sliding_window_width."""
    kinds = attention_kinds(o, out)
    if o.has("sliding_window_width"):
        # GPT-NeoX counts the earlier tokens that a token sees, we count itself as well.
        window = o["sliding_window_width"] + 1
        o.put(out, "model.sliding_window", window, "sliding_window_width")
        kinds = ["sliding" if kind == "global" else kind for kind in kinds]
    # These kinds are the default of a whole file; over a preset they may replace its list.
    default = ["global"] if not o.has("sliding_window_width") else ["sliding"]
    if kinds != default or (o.has("attention_config") and not o.complete):
        o.put(out, "model.attention_config", kinds, "attention_config", "sliding_window_width")
    if not o.has("sparsity_config"):
        return
    if SPARSE.isdisjoint(kinds):
        out.ignored.setdefault("no layer has sparse attention", []).append("sparsity_config")
    else:
        o.put(out, "model.sparsity_config", o["sparsity_config"], "sparsity_config")


def is_llama(o: NeoxOptions) -> bool:
    """Whether the options are those of LLaMA's blocks; biases and ties may be there."""
    full = {kind for kind in layer_kinds(o) if kind not in ("global", "flash")}
    return (
        NORMS.get(o["norm"], ("",))[0] == "rmsnorm"
        and o["activation"] == "swiglu"
        and (o["pos_emb"], o["rotary_pct"]) == ("rotary", 1)
        and not o["gpt_j_residual"]
        and not o["use_qk_layernorm"]
        and o["moe_num_experts"] < 2
        and not full
    )


def family(o: NeoxOptions, out: NeoxReading) -> None:
    """neox, which has all options; llama or mistral where the options compute just that.

    The family decides under which architecture a model is exported.
    """
    if not o.complete:
        return
    model = out.values.setdefault("model", {})
    name = "neox"
    if is_llama(o) and o.has("sliding_window_width"):
        # Mistral has no biases anywhere.
        biased = o["use_bias_in_attn_linear"] or model.get("mlp_bias", True)
        name = "neox" if biased else "mistral"
    elif is_llama(o):
        name = "llama"
    o.put(out, "model.family", name)
    if name != "neox":
        note(
            out,
            f"model.family is {name}, whose blocks the options describe, so that exports have its"
            " architecture; model.family=neox trains the same model",
            "model.family",
        )


MODEL_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (
        ("intermediate_size", "expansion_factor", "mlp_multiple_of", "hidden_size"),
        mlp_width,
    ),
    (("activation", "bias_gelu_fusion", "te_layernorm_mlp"), activation),
    (("use_bias_in_mlp", "te_layernorm_mlp"), biases),
    (("init_method", "output_layer_init_method"), start_weights),
    (("no_weight_tying",), tying),
    (
        ("norm", "layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon"),
        norms,
    ),
    (("hidden_dropout", "attention_dropout"), dropout),
    (
        ("pos_emb", "opt_pos_emb_offset", "rpe_num_buckets", "rpe_max_distance"),
        positions,
    ),
    (("gpt_j_tied",), residual),
    (("use_qk_layernorm", "num_kv_heads", "attention_type"), queries_and_keys),
    (("attention_config", "sparsity_config", "sliding_window_width"), attention),
    ((), family),
]
"""The options that a rule reads, and the rule."""
