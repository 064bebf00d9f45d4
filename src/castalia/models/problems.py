"""Sizes and options of a transformer that do not go together, one sentence for each fault."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from castalia.core.errors import nearest
from castalia.models.kinds.base import ATTENTION, KINDS
from castalia.models.model_config import SECTIONS

if TYPE_CHECKING:
    from castalia.models.config import TransformerConfig


def size_problems(config: "TransformerConfig") -> Iterator[str]:
    """Sizes that do not divide."""
    heads = config.num_attention_heads
    if config.attention_head_dim is None and config.hidden_size % heads:
        yield (
            f"hidden_size {config.hidden_size} is not divisible by num_attention_heads {heads};"
            " choose another number of heads, or set attention_head_dim"
        )
    if heads % config.kv_heads:
        yield (
            f"num_attention_heads {heads} is not divisible by num_kv_heads {config.kv_heads}: each"
            " head of keys serves as many query heads"
        )
    if not 0 <= config.rotary_pct <= 1 or config.rotary_dim % 2:
        yield (
            f"rotary_pct {config.rotary_pct} of head size {config.head_dim} gives"
            f" {config.rotary_dim} rotary dimensions; it must be an even number from 0 to the head"
            " size"
        )


def option_problems(config: "TransformerConfig") -> Iterator[str]:
    """Options that need another one, or exclude it."""
    if config.shared_norm and not config.parallel_residual:
        yield "shared_norm needs parallel_residual: serial parts read different inputs"
    if config.norm_placement == "post" and config.parallel_residual:
        yield "norm_placement=post needs parallel_residual=false"
    if config.mup is not None and config.mup.zero_readout and config.tie_word_embeddings:
        yield "mup.zero_readout needs a head of its own; set tie_word_embeddings=false"
    if config.rmsnorm_partial is not None and config.norm != "rmsnorm":
        yield f"rmsnorm_partial needs norm=rmsnorm, not {config.norm}"
    yield from position_problems(config)
    yield from kind_problems(config)
    if config.attention_config == ():
        yield "attention_config has no kinds; write null, or one kind for each layer"
    if "sliding" in (config.attention_config or ()) and config.sliding_window is None:
        yield "attention_config has sliding layers; set sliding_window, in tokens"
    if config.qk_norm == "neox" and config.kv_heads != config.num_attention_heads:
        yield "qk_norm=neox has one weight for queries and keys, which needs as many heads of both"
    if config.qk_norm != "none" and config.norm == "scalenorm":
        yield "qk_norm is not defined for norm=scalenorm; use layernorm or rmsnorm"


def position_problems(config: "TransformerConfig") -> Iterator[str]:
    """Options of positions that another one leaves without effect, or that divide by zero."""
    scaling = config.rope_scaling
    if scaling is not None and config.pos_emb != "rotary":
        yield f"rope_scaling needs pos_emb=rotary, not {config.pos_emb}"
    elif scaling is not None and not config.rotary_dim:
        yield "rope_scaling needs rotated dimensions; set rotary_pct above 0"
    elif scaling is not None and scaling.kind in ("ntk", "dynamic") and config.rotary_dim == 2:
        yield (
            f"rope_scaling.kind={scaling.kind} stretches the lowest frequency against the highest,"
            " and 2 rotary dimensions have one frequency; raise rotary_pct"
        )
    if config.rotary_dim and config.rotary_emb_base <= 1:
        yield f"rotary_emb_base must be above 1, got {config.rotary_emb_base}"
    if config.pos_emb == "rpe" and config.rpe_max_distance <= config.rpe_num_buckets // 2:
        yield (
            f"rpe_max_distance {config.rpe_max_distance} must be above half of rpe_num_buckets,"
            f" {config.rpe_num_buckets // 2}: the first half of the buckets are single distances"
        )
    if config.learned_offset and config.pos_emb != "learned":
        yield f"learned_offset needs pos_emb=learned, not {config.pos_emb}"
    if config.alibi_scaled and config.pos_emb != "alibi":
        yield f"alibi_scaled needs pos_emb=alibi, not {config.pos_emb}"


def kind_problems(config: "TransformerConfig") -> Iterator[str]:
    """Kinds of layers that do not exist, and sections of kinds that no layer has."""
    if config.pattern == ():
        yield "pattern has no kinds; write null, or one kind for each layer"
        return
    for name in dict.fromkeys(config.pattern or ()):
        if name != ATTENTION and name not in KINDS:
            names = (ATTENTION, *KINDS)
            yield f"pattern has {name!r}; choose from {', '.join(names)}{nearest(name, names)}"
            return
    for name, readers in SECTIONS.items():
        if getattr(config, name) is not None and not set(readers) & set(config.block_kinds):
            yield f"{name} is set, and no layer is of this kind; add it to pattern, or remove it"
    for name in config.block_kinds:
        yield from KINDS[name].problems(config)
    yield from expert_problems(config)


def expert_problems(config: "TransformerConfig") -> Iterator[str]:
    """Options of experts that do not go together."""
    moe = config.moe
    if moe is None:
        return
    if moe.top_k > moe.experts:
        yield f"moe.top_k {moe.top_k} is above moe.experts {moe.experts}; lower it"
    if moe.shared_gate and not moe.shared_size:
        yield "moe.shared_gate needs moe.shared_size, the width of the MLP for all tokens"
    if moe.router == "sinkhorn" and moe.bias_rate:
        yield (
            f"moe.router=sinkhorn balances by itself, and moe.bias_rate {moe.bias_rate} would"
            " balance a second time; set moe.bias_rate=0, or moe.router=topk"
        )
    if not config.expert_layers:
        yield "moe is set, and no layer is attention; add attention to pattern, or remove moe"
