"""Muon for the matrices of the blocks, AdamW for everything else."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import RELATIVE, WidthPowers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class MuonConfig(OptimConfig):
    """Muon: an orthogonalized momentum for matrices in blocks; embeddings, head, norms and biases
    take AdamW."""

    kind: Literal["muon"] = "muon"
    """Name of the optimizer."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the mean of gradients."""
    nesterov: bool = True
    """Orthogonalize what the momentum will be."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations of the orthogonalization."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """match_rms_adamw gives an update the size of AdamW's, so that one lr and one decay serve both;
    original scales by the root of rows / columns."""
    arithmetic: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the orthogonalization; auto is bf16 on a GPU, fp32 on a CPU."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment of AdamW."""
    eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment."""


def hidden(weight: Weight) -> Shape:
    """The shape of a matrix in a block."""
    return weight.shape if weight.hidden else None


def other(weight: Weight) -> Shape:
    """The shape of anything else."""
    return None if weight.hidden else weight.shape


@OPTIMIZERS.register("muon")
class Muon(Member):
    """m = momentum * m + (1 - momentum) * g; p -= lr * (scale * UV^T + weight_decay * p), with
    USV^T nearly the singular value decomposition of m, or of its Nesterov form.

    Ranks that share a matrix gather its momentum and each orthogonalize all of it.
    Source  Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025,
            arXiv:2502.16982.
    """

    Config = MuonConfig
    by_width = RELATIVE

    @classmethod
    def width_powers(cls, config: Any) -> WidthPowers:
        """The original scale gives every matrix the largest singular value that μP wants."""
        return WidthPowers(0.0, 0.0) if config.scale == "original" else RELATIVE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The momentum of matrices in blocks, AdamW's moments of anything else."""
        return {
            "momentum_buffer": StateTensor(shape=hidden),
            "exp_avg": StateTensor(shape=other),
            "exp_avg_sq": StateTensor(shape=other),
        }

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: torch's takes a rank's part for a matrix, and no other parameter."""
        from castalia.optim.muon_step import MuonStep

        return MuonStep(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            scale=config.scale,
            arithmetic=config.arithmetic,
            betas=config.betas,
            eps=config.eps,
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)
