"""Arithmetic of the passes: fp32, bf16, or fp16 with GPT-NeoX's dynamic loss scale; and how the
weights for it are kept and gathered."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from castalia.core.errors import TrainingError
from castalia.distributed import World
from castalia.distributed.gradients import scale_gradients
from castalia.optim.masters import Storage
from castalia.train.config import LossScaleConfig, RunConfig
from castalia.train.precision_config import HALF

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # What is not a product of a block's layers.
    "fp8": torch.bfloat16,
}
MOST_OVERFLOWS = 50
"""Consecutive overflows after which the run stops, as in GPT-NeoX."""


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast for the given precision, whatever the dtype of the weights."""
    # It also keeps the residual stream and the norms in fp32, under which bf16 weights train, too.
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


def storage(config: RunConfig, world: World) -> Storage:
    """How the parameters of a run are kept on these ranks."""
    parameters: str = config.train.parameters
    if parameters == "bf16" and world.size > 1:
        # The fp32 shards are the masters: FSDP2 gathers bf16 copies of them for each pass, so that
        # bf16 shards beside them would take memory for nothing.
        parameters = "fp32"
    return Storage(parameters, config.train.gradients, config.seed)


def gather_policy(config: RunConfig) -> MixedPrecisionPolicy:
    """In which dtypes FSDP2 gathers weights and sums gradients.

    Inputs are never cast: the residual stream between the blocks stays in fp32.
    """
    gathers = config.precision in HALF and config.parallel.gather == "auto"
    # With masters the passes read bf16 weights on one rank, so they do on several.
    gathers |= config.train.parameters != "fp32"
    if not gathers and config.train.gradients == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if gathers else None,
        # bf16 products give bf16 gradients. Sums of many of them need more bits.
        reduce_dtype=DTYPES[config.train.gradients],
        cast_forward_inputs=False,
    )


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
