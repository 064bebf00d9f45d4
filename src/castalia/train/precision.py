"""Arithmetic of the forward and backward pass: fp32, bf16 or fp16 with GPT-NeoX's dynamic loss scale."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from castalia.core.errors import TrainingError
from castalia.train.config import LossScaleConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_OVERFLOWS = 50
"""Overflows in a row after which the run stops, as in GPT-NeoX."""


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast for the given precision; weights stay fp32."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


@dataclass
class LossScale:
    """The factor on the loss under fp16. Grows x2 after `window` clean steps; halves on an overflow once
    `hysteresis` overflows are used up (DeepSpeed's DynamicLossScaler as GPT-NeoX configures it)."""

    config: LossScaleConfig
    enabled: bool
    value: float = 1.0
    clean: int = 0
    patience: int = 0
    overflows: int = 0

    @classmethod
    def of(cls, config: LossScaleConfig, precision: str) -> "LossScale":
        """The scale at the start of a run: 1 unless the precision is fp16."""
        if precision != "fp16":
            return cls(config, enabled=False)
        start = config.static or 2.0**config.initial_power
        return cls(config, enabled=True, value=start, patience=config.hysteresis)

    def update(self, overflow: bool) -> None:
        """Take note of one step; outside fp16 the scale stays 1.

        Raises  TrainingError after 50 overflows in a row.
        """
        if not self.enabled:
            return
        self.overflows = self.overflows + 1 if overflow else 0
        if self.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"fp16 gradients overflowed {self.overflows} steps in a row, loss scale {self.value:g};"
                " lower optim.lr or use precision=bf16"
            )
        if self.config.static is None:
            self.adapt(overflow)

    def adapt(self, overflow: bool) -> None:
        """The dynamic rule."""
        if overflow:
            self.clean = 0
            if self.patience > 1:
                self.patience -= 1
            else:
                self.value = max(self.value / 2, self.config.minimum)
            return
        self.clean += 1
        if self.clean % self.config.window == 0:
            self.patience = self.config.hysteresis
            self.value *= 2

    def state_dict(self) -> dict[str, float | int]:
        """What a resume needs."""
        return {name: getattr(self, name) for name in ("value", "clean", "patience", "overflows")}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from `state`; outside fp16 there is nothing to continue."""
        for name, value in state.items() if self.enabled else ():
            setattr(self, name, value)
