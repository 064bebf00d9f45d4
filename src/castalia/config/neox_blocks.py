"""Rules for GPT-NeoX's layers without attention: Mamba, RWKV, gMLP and aMLP in attention_config.

Source  GPT-NeoX at ea7aefd8, megatron/model/{gpt2_model,gmlp}.py, mamba/mamba.py, rwkv/v6/rwkv.py.
"""

from castalia.config.neox_attention import ATTENTION, UNGATED, block_pattern, has_attention
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong

OWN = {
    "mamba": ("mamba_use_bias_in_conv", "mamba_use_bias_in_linears"),
    "rwkv6": ("dim_att",),
    "amlp": ("gmlp_attn_dim",),
}
"""Kind of layer -> the options that only such layers read."""
RWKV_EPSILON = 1e-5
"""Of the norms in RWKV's layers, torch's default, whatever the file says."""
IN_SCORES = ("rotary", "alibi", "rpe")
"""Positions that enter in attention alone; the others are added to the embedding."""
NAMES = {"mamba": "Mamba", "rwkv6": "RWKV", "gmlp": "gMLP", "amlp": "aMLP"}
OF_ATTENTION = {
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "pos_emb": "pos_emb",
    "rotary_pct": "rotary_pct",
    "rotary_emb_base": "rotary_emb_base",
    "gpt_j_residual": "parallel_residual",
    "gpt_j_tied": "shared_norm",
    "use_qk_layernorm": "qk_norm",
    "use_bias_in_attn_linear": "attention_bias",
    "use_bias_in_mlp": "mlp_bias",
    "intermediate_size": "intermediate_size",
    "activation": "activation",
    "rpe_num_buckets": "rpe_num_buckets",
    "rpe_max_distance": "rpe_max_distance",
    "opt_pos_emb_offset": "learned_offset",
    "attention_dropout": "attention_dropout",
    "sliding_window_width": "sliding_window",
    "attention_config": "attention_config",
}
"""GPT-NeoX's option -> the key of `model` that families without attention lack."""
READ_BY_OTHERS = ("attention_config", "intermediate_size", "pos_emb", "num_attention_heads")
"""Options of these that mean something to the other kinds too, and are not listed as ignored."""


def blocks(o: NeoxOptions, out: NeoxReading) -> None:
    """`model.pattern`, and the sections of its kinds."""
    pattern = block_pattern(o)
    for kind, names in OWN.items():
        # Over a preset the layers are not known here.
        if kind not in pattern and o.complete:
            unused = [name for name in names if o.has(name)]
            if unused:
                why = f"no layer is {NAMES[kind]}"
                out.ignored.setdefault(why, []).extend(unused)
    if pattern == [ATTENTION]:
        return
    o.put(out, "model.pattern", pattern, "attention_config")
    if "mamba" in pattern:
        mamba(o, out)
    if "rwkv6" in pattern:
        rwkv(o, out)
    if {"gmlp", "amlp"} & set(pattern):
        gmlp(o, out)
    if "amlp" in pattern:
        o.put(out, "model.gmlp.attention_size", o["gmlp_attn_dim"], "gmlp_attn_dim")
    if o["model_parallel_size"] > 1 and {"mamba", "gmlp", "amlp"} & set(pattern):
        note(
            out,
            "ranks of parallel.tp compute one layer together; GPT-NeoX's model_parallel_size gives"
            " each rank selections and norms of its own channels, which is another model",
            "parallel.tp",
        )
    if o.complete and not has_attention(o):
        without_attention(o, out, pattern)


def mamba(o: NeoxOptions, out: NeoxReading) -> None:
    """Width and biases of Mamba's layers.

    Source  GPT-NeoX, megatron/model/mamba/mamba.py: d_inner is intermediate_size, or
            expansion_factor * hidden_size, or 2 * hidden_size.
    """
    width = own_width(o, 2)
    if width is not None:
        names = ("intermediate_size", "expansion_factor")
        o.put(out, "model.mamba.inner_size", width, *names)
    o.put(out, "model.mamba.conv_bias", o["mamba_use_bias_in_conv"], OWN["mamba"][0])
    o.put(out, "model.mamba.bias", o["mamba_use_bias_in_linears"], OWN["mamba"][1])
    if o["mamba_use_bias_in_linears"]:
        note(
            out,
            "mamba_use_bias_in_linears gives biases to the projections into and out of a layer;"
            " GPT-NeoX has one of the time steps and selections as well",
            "model.mamba.bias",
        )


def own_width(o: NeoxOptions, factor: float) -> int | None:
    """The width that a file gives to the inside of a layer; None leaves that of the kind."""
    if o.has("intermediate_size"):
        return int(o["intermediate_size"])
    if o.has("expansion_factor") and o.has("hidden_size"):
        width = int(o["expansion_factor"] * o["hidden_size"])
        return None if o["expansion_factor"] == factor else width
    return None


def rwkv(o: NeoxOptions, out: NeoxReading) -> None:
    """Heads and widths of RWKV's layers.

    Source  GPT-NeoX, megatron/model/rwkv/v6/rwkv.py: head_size is dim_att / num_attention_heads,
            the width inside the channel mixing is rounded down to a multiple of 32.
    """
    size = o["dim_att"] or o["hidden_size"]
    heads = o["num_attention_heads"]
    if size and heads and size % heads:
        wrong(
            out,
            f"dim_att {size} is not divisible by num_attention_heads {heads}: RWKV's heads have"
            " dim_att / num_attention_heads channels",
            "model.rwkv6.head_size",
        )
        return
    if size and heads:
        o.put(out, "model.rwkv6.head_size", size // heads, "num_attention_heads", "dim_att")
    if o.has("dim_att") and o["dim_att"] != o["hidden_size"]:
        o.put(out, "model.rwkv6.attention_size", o["dim_att"], "dim_att")
    width = own_width(o, 3.5)
    if width is not None:
        names = ("intermediate_size", "expansion_factor")
        o.put(out, "model.rwkv6.ffn_size", width // 32 * 32, *names)
    epsilon = out.values.get("model", {}).get("layernorm_epsilon", RWKV_EPSILON)
    if epsilon != RWKV_EPSILON:
        note(
            out,
            f"RWKV's norms have the epsilon {epsilon:g} of the others; GPT-NeoX's have"
            f" {RWKV_EPSILON:g}, as model.layernorm_epsilon={RWKV_EPSILON:g}",
            "model.layernorm_epsilon",
        )


def gmlp(o: NeoxOptions, out: NeoxReading) -> None:
    """gMLP as GPT-NeoX computes it, and the rows that its matrix over positions has.

    Source  GPT-NeoX, megatron/model/gmlp.py: no residual connection, biases that are not added,
            seq_length positions, and of a gated activation the function alone.
    """
    function = UNGATED.get(o["activation"], o["activation"])
    o.put(out, "model.gmlp.activation", function, "activation", "attention_config")
    o.put(out, "model.gmlp.residual", False, "attention_config")
    o.put(out, "model.gmlp.bias", False, "attention_config")
    if not o.complete:
        return
    note(
        out,
        "model.gmlp.residual is false: GPT-NeoX's gMLP layers have no residual connection;"
        " model.gmlp.residual=true is the published form",
        "model.gmlp.residual",
    )
    length = o["seq_length"]
    # Learned positions have a table of max_position_embeddings rows beside.
    if length and length != o["max_position_embeddings"] and o["pos_emb"] != "learned":
        o.put(out, "model.max_position_embeddings", length, "seq_length")
        note(
            out,
            f"model.max_position_embeddings is {length}, the seq_length: gMLP's matrix has as many"
            " positions",
            "model.max_position_embeddings",
        )


def without_attention(o: NeoxOptions, out: NeoxReading, pattern: list[str]) -> None:
    """A model without attention: a family of its own if its layers are of one kind.

    Learned and sinusoidal positions are added to the embedding whatever the layers are, and so is
    the dropout behind it; these families have neither.
    """
    model = out.values["model"]
    kind = pattern[0]
    added = o["pos_emb"] not in (*IN_SCORES, "none")
    # The heads of RWKV are in its section, the others have none.
    ignored = [name for name in given(o, model) if name not in READ_BY_OTHERS]
    if kind != "rwkv6":
        ignored += [name for name in ("num_attention_heads",) if o.has(name)]
    out.ignored.setdefault("no layer has attention", []).extend(ignored)
    if len(pattern) > 1 or added or o["hidden_dropout"]:
        # A model of a transformer's family has heads that divide its width, of whatever use.
        model["num_attention_heads"] = 1
        if not added:
            model["pos_emb"] = "none"
        remark_positions(o, out, pattern)
        return
    for key in OF_ATTENTION.values():
        model.pop(key, None)
    model.pop("hidden_dropout", None)
    del model["pattern"]
    o.put(out, "model.family", kind, "attention_config")


def given(o: NeoxOptions, model: dict[str, object]) -> list[str]:
    """Options of attention and MLP that a file gives."""
    return [name for name, key in OF_ATTENTION.items() if o.has(name) and key in model]


def remark_positions(o: NeoxOptions, out: NeoxReading, pattern: list[str]) -> None:
    """A file of recurrent layers that says nothing of positions gets a table of them."""
    if o.has("pos_emb") or not {"mamba", "rwkv6"} & set(pattern):
        return
    text = (
        "pos_emb is not given and GPT-NeoX's default is learned, which adds a table of positions"
        " that recurrent layers do not need: model.pos_emb=none"
    )
    if len(pattern) == 1:
        text += (
            f"; `pos_emb: none` in the file makes it model.family={pattern[0]}, which exports have"
        )
    note(out, text, "model.pos_emb")


KEYS = ("attention_config", *(name for names in OWN.values() for name in names))
BLOCK_RULES: list[tuple[tuple[str, ...], OptionRule]] = [(KEYS, blocks)]
"""The options that the rule reads, and the rule."""
