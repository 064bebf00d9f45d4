"""The loss scale of fp16: GPT-NeoX's dynamic rule. Needs no torch until gradients are divided."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from castalia.config.base import Config
from castalia.core.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

MOST_OVERFLOWS = 50
"""Consecutive overflows after which the run stops, as in GPT-NeoX."""


class LossScaleConfig(Config):
    """Loss scaling under fp16, GPT-NeoX's rule. Only optim/loss_scale.py reads these fields."""

    static: PositiveFloat | None = None
    """A fixed scale; null scales dynamically."""
    initial_power: NonNegativeInt = 12
    """The dynamic scale starts at 2 ** this."""
    window: PositiveInt = 1000
    """Clean steps after which the scale doubles."""
    # These defaults are those of the `fp16` section of GPT-NeoX's configs.
    hysteresis: PositiveInt = 2
    """Overflows that are tolerated before the scale halves."""
    minimum: PositiveFloat = 1.0
    """Smallest scale."""


class NoScale:
    """The loss scale of fp32 and bf16, whose range needs none: a factor of 1 for ever."""

    enabled = False
    value = 1.0

    def unscale(self, parameters: "Iterable[nn.Parameter]") -> None:
        """Leave the gradients as they are."""

    def update(self, overflow: bool) -> None:
        """Ignore the step."""

    def metrics(self, updates: int) -> dict[str, Any]:
        """Nothing to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue."""


@dataclass
class LossScale:
    """The factor on the loss under fp16, whose smallest number is 6e-8.

    Doubles after `window` clean steps; halves on an overflow once `hysteresis` overflows are used.
    Source  DeepSpeed's DynamicLossScaler as GPT-NeoX configures it.
    """

    config: LossScaleConfig
    value: float
    clean: int = 0
    patience: int = 0
    overflows: int = 0
    enabled = True

    def unscale(self, parameters: "Iterable[nn.Parameter]") -> None:
        """Divide the gradients by the scale, before they are clipped."""
        from castalia.distributed.gradients import scale_gradients

        scale_gradients(parameters, 1 / self.value)

    def update(self, overflow: bool) -> None:
        """Adapt to one step.

        Raises  TrainingError after 50 consecutive overflows.
        """
        if not overflow:
            self.overflows = 0
        else:
            self.overflows += 1
        # A scale that no longer helps: the gradients are infinite for another reason.
        if self.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"fp16 gradients overflowed in {self.overflows} consecutive steps, loss scale"
                f" {self.value:g}; lower optim.lr or use precision=bf16"
            )
        if self.config.static is None:
            self.adapt(overflow)

    def adapt(self, overflow: bool) -> None:
        """The dynamic rule."""
        if overflow:
            # Hysteresis: one freak batch does not cost half of the range.
            self.clean = 0
            if self.patience > 1:
                self.patience -= 1
            else:
                self.value = max(self.value / 2, self.config.minimum)
            return
        self.clean += 1
        # Try a larger scale: small gradients vanish below 6e-8 under a scale that is too low.
        if self.clean % self.config.window == 0:
            self.patience = self.config.hysteresis
            self.value *= 2

    def metrics(self, updates: int) -> dict[str, Any]:
        """The scale, and the updates made: under fp16 they may be fewer than the steps."""
        return {"loss_scale": self.value, "updates": updates}

    def state_dict(self) -> dict[str, float | int]:
        """The state for a resume."""
        return {name: getattr(self, name) for name in ("value", "clean", "patience", "overflows")}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from `state`."""
        for name, value in state.items():
            setattr(self, name, value)


def make_scale(config: LossScaleConfig, precision: str) -> LossScale | NoScale:
    """The scale at the start of a run."""
    if precision != "fp16":
        return NoScale()
    # A power of two scales without rounding, so that fp16 alone decides the bits.
    start = config.static or 2.0**config.initial_power
    return LossScale(config, start, patience=config.hysteresis)
