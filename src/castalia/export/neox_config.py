"""The YAML file that makes GPT-NeoX build one of our models, and the options that it cannot build.

Source  gpt-neox at ea7aefd8: megatron/neox_arguments/neox_args.py (names and defaults),
        megatron/model/{transformer,activations,norms}.py (what they compute).
"""

from dataclasses import dataclass
from typing import Any

from castalia.export.neox_layers import (
    expert_lacks,
    expert_options,
    layer_lacks,
    layer_options,
)
from castalia.models.config import TransformerConfig
from castalia.models.model_config import BlocksConfig, ModelConfig

UNCHANGED = (
    *("relu", "softsign", "swish", "silu", "mish"),
    *("geglu", "reglu", "swiglu", "bilinear", "glu"),
)
"""Activations that have the same name there."""
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu": {"activation": "gelu", "bias_gelu_fusion": False},
    # Its fused kernel computes the approximation with tanh.
    "gelu_tanh": {"activation": "gelu", "bias_gelu_fusion": True},
    **{name: {"activation": name} for name in UNCHANGED},
}
"""Our activations that it has, in its options."""
NORM_EPSILONS = {
    "layernorm": "layernorm_epsilon",
    "non_parametric_layernorm": "layernorm_epsilon",
    "rmsnorm": "rms_norm_epsilon",
    "scalenorm": "scalenorm_epsilon",
}
TRAINING: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_iters": 1,
    "lr_decay_iters": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8}},
}
"""Options that GPT-NeoX demands and that are no part of the model; a user replaces them."""


@dataclass(frozen=True)
class NeoxShape:
    """How a checkpoint is divided into files."""

    model_parallel_size: int = 1
    """Shards of each matrix; GPT-NeoX cannot change their number when it loads."""
    pipe_parallel_size: int = 1
    """0 for the form without a pipeline; otherwise any degree reads the files of another."""


def neox_refuses(config: ModelConfig) -> str | None:
    """Why GPT-NeoX cannot compute a model of `config`, in one sentence; None if it can."""
    lacks = neox_lacks(config)
    if lacks is None:
        return None
    return f"GPT-NeoX cannot express model.{lacks}"


def neox_lacks(config: ModelConfig) -> str | None:
    """The first option of `config` that GPT-NeoX lacks, as NAME=VALUE."""
    if not isinstance(config, TransformerConfig):
        if not isinstance(config, BlocksConfig):
            return f"family={config.family}"
        return next(layer_lacks(config), None)
    wrong = [
        ("head", config.head, config.head != "vocab"),
        ("activation", config.activation, config.activation not in ACTIVATIONS),
        ("qk_norm", config.qk_norm, config.qk_norm not in ("none", "neox")),
        ("norm_placement", config.norm_placement, config.norm_placement != "pre"),
        ("rmsnorm_partial", config.rmsnorm_partial, config.rmsnorm_partial is not None),
        ("rope_scaling", rope_kind(config), config.rope_scaling is not None),
        ("attention_head_dim", config.attention_head_dim, not square_heads(config)),
        ("alibi_scaled", True, config.pos_emb == "alibi" and config.alibi_scaled),
        ("intermediate_size", config.ffn_size, not config.gated and config.ffn_size % 2 == 1),
        ("attention_config", config.attention_config, has_mixed_windows(config)),
        ("pattern", config.pattern, config.pattern is not None),
        *multipliers(config),
    ]
    for name, value, is_wrong in wrong:
        if is_wrong:
            return f"{name}={value}"
    return next(expert_lacks(config), None)


def rope_kind(config: TransformerConfig) -> str | None:
    """The kind of the scaled frequencies."""
    if config.rope_scaling is None:
        return None
    return config.rope_scaling.kind


def square_heads(config: TransformerConfig) -> bool:
    """Whether the heads together are as wide as the model."""
    return config.head_dim * config.num_attention_heads == config.hidden_size


def has_mixed_windows(config: TransformerConfig) -> bool:
    """Whether some layers have a sliding window and others see the whole row."""
    return "sliding" in config.layer_kinds and len(config.layer_kinds) > 1


def multipliers(config: TransformerConfig) -> list[tuple[str, Any, bool]]:
    """Factors of the embedding and the logits, which GPT-NeoX has under μP alone."""
    out = []
    for name in ("embedding_multiplier", "output_multiplier"):
        value = getattr(config, name, 1.0)
        out.append((name, value, value != 1.0))
    return out


def neox_notes(config: BlocksConfig) -> list[str]:
    """What a user of the checkpoint should know, one sentence each."""
    notes = [
        "GPT-NeoX reads it with `load: FOLDER` and `finetune: true`; vocab_file is relative to the"
        " folder, and the options of training in configs/model.yml are placeholders"
    ]
    if not isinstance(config, TransformerConfig):
        return notes
    built = expressed(config)
    added = [name for name in ("attention_bias", "mlp_bias") if getattr(built, name)]
    had = {
        "attention_bias": config.attention_bias and config.has_qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
    if zeros := [name for name in added if not had[name]]:
        notes.append(
            f"GPT-NeoX wants biases that the model lacks ({', '.join(zeros)}); they are zeros"
        )
    if config.rope_numerics != "fp32":
        notes.append(
            f"rope_numerics={config.rope_numerics} is that of GPT-NeoX v1.0; newer versions compute"
            " rotary tables in float32"
        )
    return notes


def expressed(config: TransformerConfig) -> TransformerConfig:
    """The config of the model as GPT-NeoX will build it: where it wants a bias that ours lacks, the
    file has zeros.

    Its MLP without a gate adds its bias in any case, and without biases in the MLP its parallel
    blocks leave out the attention (transformer.py, ParallelMLP and ParallelTransformerLayer).
    """
    attention = config.attention_bias or config.has_qkv_bias
    mlp = config.mlp_bias or not config.gated or config.parallel_residual
    return config.model_copy(
        update={"attention_bias": attention, "qkv_bias": None, "mlp_bias": mlp}
    )


def padding_unit(config: BlocksConfig, ranks: int, ids: int) -> int:
    """make_vocab_size_divisible_by, from which GPT-NeoX gets the rows of the embedding: it rounds
    the tokenizer's `ids` up to a multiple of this times the ranks."""
    rows = config.padded_vocab_size
    unit = config.make_vocab_size_divisible_by
    if unit % ranks == 0 and -(-ids // unit) * unit == rows:
        return unit // ranks
    return rows // ranks


def neox_options(config: BlocksConfig, shape: NeoxShape, dtype: str, ids: int) -> dict[str, Any]:
    """The options of the model, for a YAML file; `ids` is the number of the tokenizer's."""
    ranks = shape.model_parallel_size
    options: dict[str, Any] = {
        "pipe_parallel_size": shape.pipe_parallel_size,
        "model_parallel_size": ranks,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "make_vocab_size_divisible_by": padding_unit(config, ranks, ids),
        "no_weight_tying": not config.tie_word_embeddings,
        "output_layer_parallelism": "column",
        "norm": config.norm,
        NORM_EPSILONS[config.norm]: config.layernorm_epsilon,
    }
    if isinstance(config, TransformerConfig):
        options |= transformer_options(config)
    else:
        options |= layer_options(config)
    options |= {
        "init_method": config.init_method,
        "output_layer_init_method": config.output_layer_init_method,
        "init_method_std": config.init_method_std,
        "hidden_dropout": getattr(config, "hidden_dropout", 0.0),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "precision": {"fp32": "fp32", "fp16": "fp16", "bf16": "bfloat16"}[dtype],
    }
    if dtype == "bf16":
        # Its reader asks for the stage without looking whether there is one.
        options["zero_optimization"] = {"stage": 0}
    return options


def transformer_options(config: TransformerConfig) -> dict[str, Any]:
    """The options of layers with attention."""
    built = expressed(config)
    options: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "gpt_j_residual": config.parallel_residual,
        "gpt_j_tied": config.shared_norm,
        "use_qk_layernorm": config.qk_norm == "neox",
        **ACTIVATIONS[config.activation],
        **mlp_options(config),
        **expert_options(config),
        "use_bias_in_attn_linear": built.attention_bias,
        "use_bias_in_mlp": built.mlp_bias,
        **position_options(config),
        **attention_options(config),
    }
    if config.kv_heads != config.num_attention_heads:
        options["num_kv_heads"] = config.kv_heads
    return options


def mlp_options(config: TransformerConfig) -> dict[str, Any]:
    """The width inside the MLP.

    GPT-NeoX takes two thirds of the width of a gated MLP and rounds up to mlp_multiple_of. With the
    true width as both the result is that width, and its converter to Hugging Face, which reads
    intermediate_size as it stands, is right, too.
    """
    if not config.gated:
        return {"intermediate_size": config.ffn_size}
    return {"intermediate_size": config.ffn_size, "mlp_multiple_of": config.ffn_size}


def position_options(config: TransformerConfig) -> dict[str, Any]:
    """Where positions enter."""
    options: dict[str, Any] = {"pos_emb": config.pos_emb}
    if config.pos_emb == "rotary":
        options["rotary_pct"] = config.rotary_pct
        options["rotary_emb_base"] = whole(config.rotary_emb_base)
    elif config.pos_emb == "learned" and config.learned_offset:
        options["opt_pos_emb_offset"] = config.learned_offset
        # Its table has no rows for the offset beside those of the positions.
        options["max_position_embeddings"] = config.max_position_embeddings + config.learned_offset
    elif config.pos_emb == "rpe":
        options["rpe_num_buckets"] = config.rpe_num_buckets
        options["rpe_max_distance"] = config.rpe_max_distance
    return options


def whole(number: float) -> float | int:
    """A number as GPT-NeoX's options are typed: its rotary base is an integer."""
    if float(number).is_integer():
        return int(number)
    return number


def attention_options(config: TransformerConfig) -> dict[str, Any]:
    """The kind of attention of each layer."""
    kinds = [config.layer_kind(layer) for layer in range(config.num_layers)]
    options: dict[str, Any] = {
        "attention_config": ["global" if kind == "sliding" else kind for kind in kinds]
    }
    if "sliding" in kinds and config.sliding_window is not None:
        # A token sees this many before it, and itself.
        options["sliding_window_width"] = config.sliding_window - 1
    sparsity = getattr(config, "sparsity_config", None)
    if sparsity is not None:
        options["sparsity_config"] = sparsity.model_dump(mode="json", exclude_none=True)
    return options
