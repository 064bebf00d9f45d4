"""AdamW with moments of 8 bits."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import ADAM_LIKE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BLOCK = 64
"""Numbers in a row that share a scale. Blocks never cross rows, so that ranks can split both
dimensions of a matrix."""
FEWEST = 4096
"""Numbers of the smallest parameter with 8 bits, as in bitsandbytes."""


class AdamW8bitConfig(OptimConfig):
    """AdamW with moments of 8 bits for the matrices of the blocks; embeddings, head and vectors
    keep 32 bits."""

    kind: Literal["adamw8bit"] = "adamw8bit"
    """Name of the optimizer."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


def is_small(weight: Weight) -> bool:
    """Whether a parameter's moments have 8 bits.

    Of embeddings most rows have no gradient in a step, and the moments of the others span many
    orders: bitsandbytes and the paper keep them in 32 bits as well.
    """
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    return weight.hidden and columns % BLOCK == 0 and rows * columns >= FEWEST


def codes(weight: Weight) -> Shape:
    """A code for each number."""
    return weight.shape if is_small(weight) else None


def scales(weight: Weight) -> Shape:
    """A scale for each block of a row."""
    return (weight.shape[0], weight.shape[1] // BLOCK) if is_small(weight) else None


def full(weight: Weight) -> Shape:
    """The shape of the moments in 32 bits."""
    return None if is_small(weight) else weight.shape


@OPTIMIZERS.register("adamw8bit")
class AdamW8bit(Member):
    """AdamW whose moments are kept as 8-bit codes of a dynamic map, with a scale for each block.

    Source  Dettmers et al. 2022, arXiv:2110.02861.
    """

    Config = AdamW8bitConfig
    by_width = ADAM_LIKE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """Codes and scales of both moments, or the moments where they have 32 bits."""
        state = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = StateTensor(shape=full)
            state[f"{moment}_codes"] = StateTensor("uint8", shape=codes)
            state[f"{moment}_scales"] = StateTensor(shape=scales)
        return state

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here, with the codes of torchao and bitsandbytes: their blocks cross rows, so
        that their state cannot be cut again for another number of ranks."""
        from castalia.optim.adamw8bit_step import AdamW8bitStep

        return AdamW8bitStep(groups, lr=config.lr, betas=config.betas, eps=config.eps)

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)

    @classmethod
    def objection(cls, weight: Weight, local: tuple[int, ...]) -> str | None:
        """Ranks that split columns must not split a block."""
        if not is_small(weight) or local[1] % BLOCK == 0:
            return None
        return (
            f"has {weight.shape[1]} columns, of which a rank holds {local[1]}, and {BLOCK} in a row"
            " share a scale"
        )
