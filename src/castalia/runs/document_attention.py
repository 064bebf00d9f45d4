"""What FlexAttention cannot do for a run that asks for it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from castalia.models.config import TransformerConfig

if TYPE_CHECKING:
    from castalia.runs.config import RunConfig

NARROWEST_HEAD = 16
"""torch's kernel has no products of fewer numbers (torch/_inductor/kernel/flex)."""


def document_attention_problems(config: "RunConfig") -> Iterator[str]:
    """One sentence for each."""
    if config.train.document_attention == "dense":
        return
    for why in reasons(config):
        yield f"train.document_attention=flex: {why}, or set train.document_attention=dense"


def reasons(config: "RunConfig") -> Iterator[str]:
    """Why not, and what to change."""
    model = config.model
    parallel = config.parallel
    if config.data.document_mask is None:
        yield "without data.document_mask a row is one text, with nothing to skip; set it"
    if not isinstance(model, TransformerConfig):
        yield f"model.family {model.family} has no attention; choose another family"
        return
    if model.pos_emb in ("alibi", "rpe"):
        yield f"model.pos_emb={model.pos_emb} adds a bias to the scores; use rotary positions"
    if model.attention_dropout:
        yield "it drops no probabilities; set model.attention_dropout=0"
    if sparse := sorted(set(model.layer_kinds) - {"global", "sliding"}):
        yield f"it has no pattern {sparse[0]}; use global or sliding in model.attention_config"
    if model.head_dim < NARROWEST_HEAD:
        yield (
            f"heads of {model.head_dim} dimensions are narrower than {NARROWEST_HEAD}; lower"
            " model.num_attention_heads"
        )
    for axis in ("cp", "tp"):
        if getattr(parallel, axis) > 1:
            yield f"it is not split over ranks; set parallel.{axis}=1"
    if config.curriculum.kind != "none":
        yield "it compiles for each length of rows; set curriculum.kind=none"
    if config.monitor.attention_logits_every is not None:
        yield "logits are measured under a dense mask; set monitor.attention_logits_every=null"
