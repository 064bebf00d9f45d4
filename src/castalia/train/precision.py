"""Arithmetic of the passes: fp32, bf16, or fp16 with GPT-NeoX's dynamic loss scale."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from castalia.core.errors import TrainingError
from castalia.distributed.gradients import scale_gradients
from castalia.train.config import LossScaleConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_OVERFLOWS = 50
"""Consecutive overflows after which the run stops, as in GPT-NeoX."""


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast for the given precision; weights stay fp32."""
    # Autocast rather than half-precision weights: an update of lr 1e-4 is below bf16's resolution.
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


class NoScale:
    """The loss scale of fp32 and bf16, whose range needs none: a factor of 1 for ever."""

    enabled = False
    value = 1.0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
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

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, before they are clipped."""
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
