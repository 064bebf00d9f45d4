"""The architectures of llama.cpp that compute models of ours, as data.

llama.cpp has a graph for each architecture of a GGUF file, and a file's options are those that the
graph reads. A model is written as the first architecture that computes all its options, whatever
its family is called.

Source  llama.cpp, src/models/*.cpp (the graphs, and which tensors each loads) and
        src/llama-model.cpp (llama_model_rope_type).
"""

from collections.abc import Mapping
from typing import NamedTuple

from castalia.experts.expressing import unexpressed_experts
from castalia.formats.gguf_recurrent import RECURRENT
from castalia.inference.gguf_recurrent import recurrent_refusal
from castalia.inference.implements import ATTENTION, SIZES, Values, patterned, unimplemented
from castalia.models.config import TransformerConfig, require_transformer
from castalia.models.model_config import ModelConfig
from castalia.models.windows import window

ROTARY: dict[str, Values] = {
    "pos_emb": ("rotary",),
    "rotary_pct": (1.0,),
    "rotary_emb_base": None,
    "rope_numerics": ("fp32", "neox_v1_fp16"),
    "rope_scaling": (None, "linear", "ntk", "yarn"),
    "alibi_scaled": (True, False),
}
"""Rotation of whole heads. The frequencies of ntk are those of another base."""
UNROTATED: dict[str, Values] = {
    "parallel_residual": (False,),
    "rotary_pct": None,
    "rotary_emb_base": None,
    "rope_numerics": None,
}
"""Serial blocks with other positions; what rotation would be says nothing about them."""
BASE: dict[str, Values] = SIZES | {
    "family": ATTENTION,
    # `missing_experts` looks at the section.
    "moe": None,
    # Folded into the embedding and the head.
    "embedding_multiplier": None,
    "output_multiplier": None,
    # A window that hides nothing; `refusal` looks at the others.
    "sliding_window": None,
    "attention_config": None,
    "learned_offset": None,
    "alibi_numerics": ("fp32", "bf16"),
}
LAYERNORM: dict[str, Values] = BASE | {
    "norm": ("layernorm", "non_parametric_layernorm"),
    # llama.cpp has one GELU, in its tanh form, whatever the model was trained with.
    "activation": ("gelu_tanh",),
}
SWIGLU: dict[str, Values] = (
    BASE
    | ROTARY
    | {
        "norm": ("rmsnorm",),
        "activation": ("swiglu",),
        "parallel_residual": (False,),
    }
)
NO_BIASES: dict[str, Values] = {"attention_bias": (False,), "mlp_bias": (False,)}
"""None but those of queries, keys and values."""

FUSED = dict.fromkeys(("qkv", "q", "k", "v"), "attn_qkv")
SPLIT = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}
NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention_out": "attn_output",
    "mlp_gate": "ffn_gate",
    "mlp_up": "ffn_up",
    "mlp_down": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
FUSED_NAMES = NAMES | FUSED
SPLIT_NAMES = NAMES | SPLIT


EXPERTS = {
    "router.weight": "ffn_gate_inp",
    "experts.gate": "ffn_gate_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
}
"""Tensors of the experts of a block, by our names inside its MLP; each holds all experts."""
SHARED = {
    "shared.gate.weight": "ffn_gate_shexp",
    "shared.up.weight": "ffn_up_shexp",
    "shared.down.weight": "ffn_down_shexp",
    "shared_gate.weight": "ffn_gate_inp_shexp",
}
"""Those of the MLP for all tokens."""
SHARED_GATE = "ffn_gate_inp_shexp"
"""A vector there, a matrix of one row here."""


class Mixture(NamedTuple):
    """The experts that an architecture computes, in all layers."""

    options: Mapping[str, Values]
    """Options of `moe` beside the numbers of experts, as in castalia.experts.expressing."""
    names: Mapping[str, str] = EXPERTS
    alone: bool = True
    """Whether it has no form with one MLP."""


class Architecture(NamedTuple):
    """One architecture."""

    name: str
    """The value of general.architecture."""
    implements: Mapping[str, Values]
    """Options that its graph computes, see implements.py."""
    names: Mapping[str, str]
    """Its tensors of a block by the roles of our parts."""
    square: bool = True
    """Whether all query heads together must be as wide as the model."""
    every_bias: bool = False
    """Whether it requires biases, so that missing ones are written as zeros."""
    head: bool = False
    """Whether it requires the output head of a tied model, too."""
    adjacent_pairs: bool = False
    """Whether rotation turns dimensions 2j and 2j + 1, in place of j and j + R / 2."""
    frequency_factors: bool = False
    """Whether it reads a factor for each rotary frequency (rope_freqs.weight)."""
    windows: bool = False
    """Whether it reads which layers have a sliding window."""
    mixture: Mixture | None = None
    """Its experts, where it has any."""


ARCHITECTURES = (
    Architecture(
        "gptneox",
        LAYERNORM
        | ROTARY
        | {"rotary_pct": None, "parallel_residual": (True, False), "shared_norm": (True, False)},
        FUSED_NAMES,
        every_bias=True,
        head=True,
    ),
    Architecture(
        "llama",
        SWIGLU | {"rope_scaling": (None, "linear", "ntk", "yarn", "llama3")},
        SPLIT_NAMES,
        square=False,
        adjacent_pairs=True,
        frequency_factors=True,
        mixture=Mixture({"normalize": (True,), "expert_size": None}, alone=False),
    ),
    Architecture(
        "falcon",
        LAYERNORM
        | ROTARY
        | NO_BIASES
        | {
            "qkv_bias": (None, False),
            "parallel_residual": (True,),
            "shared_norm": (True, False),
        },
        FUSED_NAMES,
    ),
    Architecture(
        "gpt2",
        LAYERNORM
        | UNROTATED
        | {"pos_emb": ("learned", "sinusoidal"), "alibi_scaled": (True, False)},
        FUSED_NAMES,
        every_bias=True,
    ),
    Architecture("qwen2", SWIGLU | NO_BIASES, SPLIT_NAMES),
    Architecture("qwen3", SWIGLU | NO_BIASES | {"qk_norm": ("head",)}, SPLIT_NAMES, square=False),
    Architecture(
        "olmo2",
        SWIGLU | NO_BIASES | {"qk_norm": ("width",), "norm_placement": ("post",)},
        SPLIT_NAMES | {"attention_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"},
        head=True,
        windows=True,
    ),
    Architecture(
        "olmoe",
        SWIGLU | NO_BIASES | {"qk_norm": ("width",)},
        SPLIT_NAMES,
        head=True,
        mixture=Mixture({"expert_size": None}),
    ),
    Architecture(
        "qwen2moe",
        SWIGLU | NO_BIASES,
        SPLIT_NAMES,
        head=True,
        mixture=Mixture(
            {"expert_size": None, "shared_size": None, "shared_gate": (True,)}, EXPERTS | SHARED
        ),
    ),
    Architecture(
        "mpt",
        LAYERNORM | UNROTATED | {"pos_emb": ("alibi",)},
        FUSED_NAMES,
    ),
    Architecture(
        "stablelm",
        LAYERNORM
        | ROTARY
        | NO_BIASES
        | {
            "activation": ("swiglu",),
            "rotary_pct": None,
            "parallel_residual": (True, False),
            "shared_norm": (True, False),
        },
        SPLIT_NAMES,
        head=True,
    ),
)
"""In the order in which they are tried."""
OWN = {
    "neox": "gptneox",
    "llama": "llama",
    "mistral": "llama",
    "falcon": "falcon",
    "palm": "stablelm",
    "gpt2": "gpt2",
    "olmo2": "olmo2",
    "qwen2": "qwen2",
}
"""The architecture that is tried first for a family, and whose lack is named if none fits."""


def preferred(config: TransformerConfig) -> list[Architecture]:
    """All architectures, those of the model's own family first."""
    own = OWN.get(config.family)
    if own == "qwen2" and config.qk_norm == "head":
        own = "qwen3"
    if own == "qwen2" and config.moe is not None:
        own = "qwen2moe"
    if config.moe is not None and config.qk_norm == "width":
        own = "olmoe"
    return sorted(ARCHITECTURES, key=lambda architecture: architecture.name != own)


def architecture_of(config: TransformerConfig) -> Architecture:
    """The architecture that a model is written as; `refusal` has found that there is one."""
    return next(one for one in preferred(config) if lacks(one, config) is None)


def refusal(config: ModelConfig) -> str | None:
    """Why no architecture computes the model, in one sentence; None if one does."""
    if config.family in RECURRENT:
        return recurrent_refusal(config)
    if config.family not in ATTENTION:
        return f"engine=llama.cpp does not implement family={config.family!r}"
    model = require_transformer(config, "llama.cpp")
    reasons = [lacks(architecture, model) for architecture in preferred(model)]
    return None if None in reasons else reasons[0]


def lacks(architecture: Architecture, config: TransformerConfig) -> str | None:
    """What an architecture cannot compute of a model, in one sentence; None if it computes all."""
    missing = unimplemented(config, architecture.implements)
    if missing is not None:
        return f"engine=llama.cpp does not implement {missing}"
    if config.pos_emb == "rotary" and not config.rotary_dim:
        return "llama.cpp cannot express rotary_pct=0: it rotates some dimensions of every head"
    heads = config.num_attention_heads
    if architecture.square and heads * config.head_dim != config.hidden_size:
        return (
            f"engine=llama.cpp does not implement attention_head_dim={config.attention_head_dim}"
            f" of {heads} heads in a width of {config.hidden_size} for {architecture.name}"
        )
    return missing_experts(architecture, config) or missing_form(architecture, config)


def missing_experts(architecture: Architecture, config: TransformerConfig) -> str | None:
    """The same for experts, of which it may have none, or nothing else."""
    prefix = f"engine=llama.cpp does not implement {{}} for {architecture.name}"
    mixture = architecture.mixture
    moe = config.moe
    if moe is None:
        alone = mixture is not None and mixture.alone
        return prefix.format("layers without experts") if alone else None
    if mixture is None:
        return prefix.format(f"moe.experts={moe.experts}")
    lacking = next(unexpressed_experts(moe, mixture.options), None)
    return None if lacking is None else prefix.format(lacking)


def missing_form(architecture: Architecture, config: TransformerConfig) -> str | None:
    """The same for options that exclude each other."""
    prefix = f"engine=llama.cpp does not implement {{}} for {architecture.name}"
    if patterned(config):
        return prefix.format(f"attention_config={config.attention_config!r}")
    if window(config) is not None and not architecture.windows:
        return prefix.format(f"sliding_window={config.sliding_window}")
    if window(config) is not None and config.rope_scaling is not None:
        # Layers with a window are rotated without scaling there.
        return prefix.format(f"sliding_window with rope_scaling.kind={config.rope_scaling.kind!r}")
    own_norms = config.parallel_residual and not config.shared_norm
    if architecture.name == "stablelm" and own_norms:
        return prefix.format("parallel_residual=True with shared_norm=False")
    return scaling_form(architecture, config, prefix)


def scaling_form(architecture: Architecture, config: TransformerConfig, prefix: str) -> str | None:
    """The same for YaRN's bounds, of which llama.cpp has one choice."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn" or architecture.frequency_factors:
        return None
    for name, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if getattr(scaling, name) != value:
            return prefix.format(f"rope_scaling.{name}={getattr(scaling, name)}")
    return None
