"""Learning rate by step.

Source  GPT-NeoX, megatron/learning_rates.py, at v1.0 and today.
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from castalia.config.base import Config

Schedule = Callable[[int], float]
"""Number of updates already made -> learning rate of the next one."""


class ScheduleConfig(Config):
    """Learning rate by step. Only optim/schedule.py reads these fields."""

    name: Literal["cosine", "cosine_neox_v1", "linear", "exponential", "constant", "wsd"] = "cosine"
    """cosine falls to min_lr; cosine_neox_v1 is Pythia's: towards 0 over the whole horizon,
    floored, and lr 0 at step 0."""
    warmup: float = Field(0.01, ge=0, le=1)
    """Share of the horizon over which the rate rises linearly; 1 rises to the end."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of the rate."""
    decay_steps: PositiveInt | None = None
    """Horizon in steps; null means train.steps."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the horizon, at its end, over which the rate falls."""

    @model_validator(mode="after")
    def rises(self) -> "ScheduleConfig":
        """The rate is above 0 somewhere: v1.0's warmup rises no longer than the decay lasts."""
        if self.name == "cosine_neox_v1" and self.warmup == 1:
            raise ValueError(
                "cosine_neox_v1 with warmup 1 has rate 0 at every step; use schedule.name=cosine,"
                " or a shorter warmup"
            )
        return self


def make_schedule(config: ScheduleConfig, lr: float, steps: int) -> Schedule:
    """The rate as a function of n, the updates already made (update number s uses n = s - 1).

    Units   lr is the peak; the horizon is config.decay_steps or `steps`; warmup is a share of the
            horizon, kept as a float as GPT-NeoX does.
    Source  cosine_neox_v1: the code that trained Pythia, where lr is 0 at n = 0 and the cosine
            falls towards 0 over the whole horizon, floored. The others: GPT-NeoX today, where
            n = 0 and n = 1 share a rate.
    """
    # A horizon of its own lets a run be made longer without bending its past rates.
    horizon = config.decay_steps or steps
    warmup = config.warmup * horizon
    if config.name == "cosine_neox_v1":
        return lambda n: neox_v1_cosine(n, lr, config.min_lr, horizon, warmup)
    shape = SHAPES[config.name]

    def rate(n: int) -> float:
        if warmup and n <= warmup:
            # max(1, n): a first update at rate 0 would be a wasted batch.
            return lr * min(1.0, max(1, n) / warmup)
        if config.name == "constant":
            # Without the floor below: a constant rate under min_lr stays what it is.
            return lr
        # min: a run longer than its horizon stays at the floor.
        done = min(1.0, (n - warmup) / max(1.0, horizon - warmup))
        return max(config.min_lr, shape(done, lr, config))

    return rate


def neox_v1_cosine(n: int, lr: float, min_lr: float, horizon: int, warmup: float) -> float:
    """GPT-NeoX v1.0: the warmup does not shorten the horizon, so the floor is reached early."""
    clamped = min(n, horizon - warmup)
    if warmup and n <= warmup:
        return lr * clamped / warmup
    return max(min_lr, lr / 2 * (math.cos(math.pi * (clamped - warmup) / horizon) + 1))


def cosine(done: float, lr: float, config: ScheduleConfig) -> float:
    """Half a cosine from lr to min_lr."""
    return config.min_lr + (lr - config.min_lr) / 2 * (1 + math.cos(math.pi * done))


def linear(done: float, lr: float, config: ScheduleConfig) -> float:
    """A straight line to 0; the caller floors it at min_lr."""
    return lr * (1 - done)


def exponential(done: float, lr: float, config: ScheduleConfig) -> float:
    """Halved over the horizon: GPT-NeoX's constant is 0.693, about ln 2."""
    return lr * math.exp(-0.693 * done)


def warmup_stable_decay(done: float, lr: float, config: ScheduleConfig) -> float:
    """Constant, then a straight line to min_lr over the last `decay_share`.

    Source  Hu et al. 2024, arXiv:2404.06395.
    """
    into_decay = max(0.0, done - (1 - config.decay_share)) / config.decay_share
    return lr - (lr - config.min_lr) * into_decay


SHAPES: dict[str, Callable[[float, float, ScheduleConfig], float]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "constant": lambda done, lr, config: lr,
    "wsd": warmup_stable_decay,
}
"""Share of the decay that is done, from 0 to 1, peak and config -> rate."""
