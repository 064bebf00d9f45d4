"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class SOAPConfig(OptimConfig):
    """SOAP: fewer steps than AdamW for much more state and work; matrices only, vectors take
    Adam."""

    kind: Literal["soap"] = "soap"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 3e-3
    """Peak learning rate, reached at the end of warmup; 0 updates nothing, for a dry run."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of every parameter that the family does not exempt (biases and norms)."""
    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    statistics_beta: float | None = Field(None, ge=0, lt=1)
    """Decay of the statistics of rows and columns; null is that of the second moment."""
    every: PositiveInt = 10
    """Updates between two updates of the eigenbases."""
    largest: PositiveInt = 10000
    """Larger dimensions, such as a vocabulary's, keep their own basis and no statistics."""


def side(dim: int) -> Any:
    """Rule of the square statistics of dimension `dim` of a matrix."""

    def shape(weight: Weight) -> Shape:
        if len(weight.shape) != 2:
            return None
        return weight.shape[dim], weight.shape[dim]

    return shape


@OPTIMIZERS.register("soap")
class SOAP(Member):
    """L and R are running means of G G^T and G^T G; Adam runs on Q_L^T G Q_R, with their
    eigenvectors Q, which a step of power iteration renews every so often.

    The first update only begins the statistics and moves nothing. Ranks that share a matrix gather
    it and each do all of its work.
    Source  Vyas et al. 2024, arXiv:2409.11321, algorithm 3.
    """

    Config = SOAPConfig

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """Adam's moments; of a matrix also two square statistics and their eigenvectors."""
        state = {"exp_avg": StateTensor(), "exp_avg_sq": StateTensor()}
        for name, dim in (("rows", 0), ("columns", 1)):
            square = limited(side(dim), config.largest)
            state[f"{name}_statistic"] = StateTensor(shape=square, whole=True)
            state[f"{name}_basis"] = StateTensor(shape=square, whole=True)
        return state

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: pytorch-optimizer's keeps lists that no checkpoint can declare, and takes a
        rank's part for a matrix."""
        from castalia.optim.soap_step import SOAPStep

        beta = config.betas[1] if config.statistics_beta is None else config.statistics_beta
        return SOAPStep(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            statistics_beta=beta,
            every=config.every,
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)


def limited(rule: Any, largest: int) -> Any:
    """The shape rule, without those of a larger size."""

    def shape(weight: Weight) -> Shape:
        found: Shape = rule(weight)
        return found if found is not None and found[0] <= largest else None

    return shape
