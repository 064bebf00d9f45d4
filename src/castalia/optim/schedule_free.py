"""Schedule-free AdamW: an average of the weights in place of a falling rate."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator

from castalia.optim.base import Member, Shape, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import ADAM_LIKE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class ScheduleFreeConfig(OptimConfig):
    """Schedule-free AdamW: takes schedule.name=constant, whose warmup it counts; validations,
    checkpoints and exports have the average."""

    kind: Literal["schedule_free"] = "schedule_free"
    """Name of the optimizer."""
    lr: NonNegativeFloat = 2.5e-3
    """Learning rate after the warmup; larger than AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Share of the average in the weights that train, and decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    power: float = Field(0.0, ge=0)
    """Update n counts n ** power in the average."""
    lr_power: float = Field(2.0, ge=0)
    """Power of the largest rate so far by which an update counts in the average, so that those of
    the warmup count little."""

    @field_validator("betas")
    @classmethod
    def averages(cls, betas: tuple[float, float]) -> tuple[float, float]:
        """With a share of 0 the average would never be tried."""
        if not 0 < betas[0] <= 1:
            raise ValueError(
                f"the first of the betas must be above 0 and at most 1, got {betas[0]}"
            )
        return betas


def two(weight: Weight) -> Shape:
    """Two numbers for each parameter."""
    return (2,)


@OPTIMIZERS.register("schedule_free")
class ScheduleFree(Member):
    """z -= lr * (g / (sqrt(v') + eps) + weight_decay * y); x = (1 - c) * x + c * z;
    y = b1 * x + (1 - b1) * z, with gradients at y, the weights that train, and the average x.

    x is kept beside y: y follows from it exactly, so that neither a validation nor a restart
    changes a bit.
    Source  Defazio et al. 2024, arXiv:2405.15682, algorithm 1.
    """

    Config = ScheduleFreeConfig
    by_width = ADAM_LIKE
    averaged = "x"

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The fast weights z, the second moment, and the average x, which is saved as the weights;
        `seen` is the sum of the average's weights and the largest rate so far."""
        return {
            "z": StateTensor(start="weights"),
            "exp_avg_sq": StateTensor(),
            "x": StateTensor(start="weights", saved=False),
            "seen": StateTensor("float64", shape=two, whole=True),
        }

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """Written here: the package schedulefree keeps y alone, and rounds it at each change
        between training and validation."""
        from castalia.optim.schedule_free_step import ScheduleFreeStep

        return ScheduleFreeStep(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            power=config.power,
            lr_power=config.lr_power,
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """The number of updates."""
        from castalia.optim.walk import step_counter

        return step_counter(updates)

    @classmethod
    def restored(cls, optimizer: Any) -> None:
        """The weights that train follow from the average and the fast weights."""
        optimizer.show_training()
