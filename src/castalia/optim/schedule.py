"""Learning rate by step: the section `schedule:`, and the rate as a function of the updates made.

Source  GPT-NeoX, megatron/learning_rates.py, at v1.0 and today; the other shapes name theirs in
        castalia.optim.shapes.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from castalia.config.base import Config
from castalia.optim.shapes import SHAPES, Course, ShapeName

Schedule = Callable[[int], float]
"""Number of updates already made -> learning rate of the next one."""
Share = Annotated[float, Field(gt=0, le=1)]


class ScheduleConfig(Config):
    """Learning rate by step. Only optim/schedule.py and optim/shapes.py read these fields."""

    name: Literal["cosine_neox_v1"] | ShapeName = "cosine"
    """cosine falls to min_lr; cosine_neox_v1 is Pythia's: towards 0 over the whole horizon,
    floored, and lr 0 at step 0. wsd is flat and then falls; infinite cools to a flat rate first;
    cosine_restarts falls and jumps up again; polynomial is a power of what is left; inverse_sqrt
    has no end."""
    warmup: float = Field(0.01, ge=0, le=1)
    """Share of the horizon over which the rate rises linearly; 1 rises to the end."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of the rise, in place of the share."""
    warmup_start: NonNegativeFloat = 0.0
    """Rate at which the rise begins, for instance the floor of the run that goes on."""
    warmup_shape: Literal["linear", "log"] = "linear"
    """Form of the rise; log is DeepSpeed's, steep at first."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of the rate."""
    decay_steps: PositiveInt | None = None
    """Horizon in steps; null means train.steps."""
    begin: NonNegativeInt = 0
    """Updates of an earlier run after which this schedule begins, with a rise of its own: warming
    up again to train on, over the steps that are left."""
    decay_share: Share = 0.2
    """wsd and infinite: share of the horizon without its warmup, at its end, over which the rate
    falls to min_lr."""
    fall_steps: PositiveInt | None = None
    """wsd and infinite: steps of that fall, in place of the share."""
    fall: Literal["linear", "cosine", "one_minus_sqrt", "exponential"] = "linear"
    """wsd and infinite: form of that fall."""
    flat_lr: NonNegativeFloat | None = None
    """infinite only: the rate between its two falls; null means a half of the peak."""
    cooldown_share: Share = 0.25
    """infinite only: share of the horizon without its warmup over which the rate cools from the
    peak to flat_lr, along half a cosine."""
    cycles: PositiveInt = 1
    """cosine_restarts only: equal cycles within the horizon; `period` sets other ones."""
    period: PositiveInt | None = None
    """cosine_restarts only: steps of the first cycle."""
    period_factor: float = Field(1.0, ge=1)
    """cosine_restarts only: each cycle is longer than the one before by this factor."""
    peak_factor: Share = 1.0
    """cosine_restarts only: the peak of each cycle is lower than the one before by this factor."""
    power: float = Field(1.0, gt=0)
    """polynomial only: power of the share of the steps that is left."""
    timescale: PositiveInt | None = None
    """inverse_sqrt only: the rate is a half after three times as many steps more; null means the
    steps of the warmup, or 10000 without one."""

    @model_validator(mode="after")
    def rises(self) -> "ScheduleConfig":
        """The rate is above 0 somewhere: v1.0's warmup rises no longer than the decay lasts."""
        whole = self.warmup == 1 and self.warmup_steps is None
        if self.name == "cosine_neox_v1" and whole:
            raise ValueError(
                "cosine_neox_v1 with warmup 1 has rate 0 at every step; use schedule.name=cosine,"
                " or a shorter warmup"
            )
        return self

    @model_validator(mode="after")
    def takes_effect(self) -> "ScheduleConfig":
        """Options that another one leaves without effect, or that have no value."""
        fields = type(self).model_fields
        for name, readers in READ_BY.items():
            if getattr(self, name) != fields[name].default and self.name not in readers:
                raise ValueError(
                    f"schedule.{name} has no effect on {self.name};"
                    f" it belongs to {' and '.join(readers)}"
                )
        if self.fall == "exponential" and not self.min_lr:
            raise ValueError(
                "fall=exponential never reaches 0: set min_lr above 0, or another fall"
            )
        if self.period is None and self.period_factor != 1:
            raise ValueError("period_factor stretches cycles of period steps; set period")
        if self.period is not None and self.cycles != 1:
            raise ValueError("cycles and period both set the length of a cycle; set one of them")
        if self.name == "cosine_neox_v1" and (self.warmup_start or self.warmup_shape != "linear"):
            raise ValueError("cosine_neox_v1 rises linearly from 0; use schedule.name=cosine")
        return self

    def warmup_of(self, horizon: int) -> float:
        """Steps of the rise; a share is kept as a float, as GPT-NeoX does."""
        if self.warmup_steps is not None:
            return float(min(self.warmup_steps, horizon))
        return self.warmup * horizon


READ_BY: dict[str, tuple[str, ...]] = {
    "fall_steps": ("wsd", "infinite"),
    "fall": ("wsd", "infinite"),
    "flat_lr": ("infinite",),
    "cooldown_share": ("infinite",),
    "cycles": ("cosine_restarts",),
    "period": ("cosine_restarts",),
    "period_factor": ("cosine_restarts",),
    "peak_factor": ("cosine_restarts",),
    "power": ("polynomial",),
    "timescale": ("inverse_sqrt",),
}
"""Option -> the schedules that read it. decay_share is not here: recipes set it beside any name."""


def rate_problems(config: ScheduleConfig, lr: float) -> list[str]:
    """One sentence for each rate of the schedule that lies above the peak `lr`, or under the
    floor."""
    problems = []
    rates = {
        "min_lr": config.min_lr,
        "warmup_start": config.warmup_start,
        "flat_lr": config.flat_lr,
    }
    for name, rate in rates.items():
        if rate is not None and rate > lr:
            problems.append(f"schedule.{name} {rate:g} is above optim.lr {lr:g}")
    if config.flat_lr is not None and config.flat_lr < config.min_lr:
        problems.append(
            f"schedule.flat_lr {config.flat_lr:g} is below schedule.min_lr {config.min_lr:g}"
        )
    return problems


def make_schedule(config: ScheduleConfig, lr: float, steps: int) -> Schedule:
    """The rate as a function of n, the updates already made (update number s uses n = s - 1).

    Units   lr is the peak; the horizon is config.decay_steps or `steps`, counted from
            config.begin; a warmup that is a share is one of the horizon, kept as a float as
            GPT-NeoX does.
    Source  cosine_neox_v1: the code that trained Pythia, where lr is 0 at n = 0 and the cosine
            falls towards 0 over the whole horizon, floored. The others: GPT-NeoX today, where
            n = 0 and n = 1 share a rate.
    """
    # A horizon of its own lets a run be made longer without bending its past rates.
    horizon = config.decay_steps or max(1, steps - config.begin)
    warmup = config.warmup_of(horizon)
    if config.name == "cosine_neox_v1":
        return lambda n: neox_v1_cosine(n - config.begin, lr, config.min_lr, horizon, warmup)
    span = max(1.0, horizon - warmup)
    shape = SHAPES[config.name](Course(lr, config.min_lr, span, warmup), config)

    def rate(n: int) -> float:
        n = max(0, n - config.begin)
        if warmup and n <= warmup:
            return config.warmup_start + (lr - config.warmup_start) * risen(n, warmup, config)
        return shape(n - warmup)

    return rate


def risen(n: int, warmup: float, config: ScheduleConfig) -> float:
    """Share of the rise after n updates, from 0 to 1."""
    # max(1, n): a first update at rate 0 would be a wasted batch.
    n = max(1, n)
    if config.warmup_shape == "log":
        # DeepSpeed's WarmupLR, whose logarithm needs two steps at least.
        return min(1.0, math.log(n + 1) / math.log(max(2.0, warmup)))
    return min(1.0, n / warmup)


def neox_v1_cosine(n: int, lr: float, min_lr: float, horizon: int, warmup: float) -> float:
    """GPT-NeoX v1.0: the warmup does not shorten the horizon, so the floor is reached early."""
    clamped = max(0, min(n, horizon - warmup))
    if warmup and n <= warmup:
        return lr * clamped / warmup
    return max(min_lr, lr / 2 * (math.cos(math.pi * (clamped - warmup) / horizon) + 1))
