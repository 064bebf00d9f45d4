"""What a schedule does after its warmup: one function a shape."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from castalia.optim.schedule import ScheduleConfig

ShapeName = Literal[
    "cosine",
    "linear",
    "exponential",
    "constant",
    "wsd",
    "infinite",
    "cosine_restarts",
    "polynomial",
    "inverse_sqrt",
]


class Course(NamedTuple):
    """The numbers of a schedule behind its warmup."""

    lr: float
    """The peak."""
    min_lr: float
    span: float
    """Steps from the end of the warmup to that of the horizon, at least 1."""
    warmup: float
    """Steps of the warmup."""

    def done(self, k: float) -> float:
        """Share of the span after k steps of it; a run longer than its horizon stays at the end."""
        return min(1.0, k / self.span)


Shape = Callable[[float], float]
"""Steps since the end of the warmup -> rate."""


def cosine(course: Course, config: "ScheduleConfig") -> Shape:
    """Half a cosine from lr to min_lr."""
    lr, low, *_ = course
    return lambda k: max(low, low + (lr - low) / 2 * (1 + math.cos(math.pi * course.done(k))))


def linear(course: Course, config: "ScheduleConfig") -> Shape:
    """A straight line to 0, floored at min_lr, as in GPT-NeoX."""
    return lambda k: max(course.min_lr, course.lr * (1 - course.done(k)))


def exponential(course: Course, config: "ScheduleConfig") -> Shape:
    """Halved over the horizon: GPT-NeoX's constant is 0.693, about ln 2."""
    return lambda k: max(course.min_lr, course.lr * math.exp(-0.693 * course.done(k)))


def constant(course: Course, config: "ScheduleConfig") -> Shape:
    """The peak; a constant rate under min_lr stays what it is."""
    return lambda k: course.lr


def warmup_stable_decay(course: Course, config: "ScheduleConfig") -> Shape:
    """Constant, then a fall to min_lr at the end of the horizon.

    Source  Hu et al. 2024, arXiv:2404.06395; the forms of the fall, Hägele et al. 2024,
            arXiv:2405.18392.
    """
    begin, length = fall_of(course, config)
    return lambda k: fallen(course.lr, course.min_lr, (k - begin) / length, config.fall)


def infinite(course: Course, config: "ScheduleConfig") -> Shape:
    """Half a cosine to a flat rate, from which training may go on any time, then a fall.

    Source  Ibrahim et al. 2024, arXiv:2403.08763, section 7.
    """
    flat = course.lr / 2 if config.flat_lr is None else config.flat_lr
    begin, length = fall_of(course, config)
    # The fall wins where both would overlap.
    cooldown = min(config.cooldown_share * course.span, begin)

    def rate(k: float) -> float:
        if k < cooldown:
            return flat + (course.lr - flat) * half_cosine(k / cooldown)
        return fallen(flat, course.min_lr, (k - begin) / length, config.fall)

    return rate


def cosine_restarts(course: Course, config: "ScheduleConfig") -> Shape:
    """Half cosines from the peak to min_lr, one after the other; after `cycles` of them the floor.

    Source  Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5.
    """
    first = config.period or course.span / config.cycles

    def rate(k: float) -> float:
        # Equal cycles end with the horizon; cycles of a period go on as long as the run.
        if config.period is None and k >= course.span:
            return course.min_lr
        number, done = cycle_of(k, first, config.period_factor)
        peak = max(course.min_lr, course.lr * config.peak_factor**number)
        return course.min_lr + (peak - course.min_lr) * half_cosine(done)

    return rate


def cycle_of(k: float, first: float, factor: float) -> tuple[int, float]:
    """Number of the cycle that step k lies in, from 0, and the share of it that is done."""
    if factor == 1:
        return int(k // first), (k % first) / first
    # The n cycles before number n have first * (factor^n - 1) / (factor - 1) steps.
    number = int(math.log(1 + k * (factor - 1) / first, factor))
    begin = first * (factor**number - 1) / (factor - 1)
    length = first * factor**number
    if k >= begin + length:
        # The logarithm was a hair short of the whole number.
        return number + 1, (k - begin - length) / (length * factor)
    return number, max(0.0, k - begin) / length


def polynomial(course: Course, config: "ScheduleConfig") -> Shape:
    """min_lr and a power of what is left above it; with power 1 a straight line to min_lr."""
    above = course.lr - course.min_lr
    return lambda k: course.min_lr + above * (1 - course.done(k)) ** config.power


def inverse_sqrt(course: Course, config: "ScheduleConfig") -> Shape:
    """Falls with the root of the steps, whatever the horizon.

    Source  Vaswani et al. 2017, arXiv:1706.03762, section 5.3; Zhai et al. 2021, arXiv:2106.04560.
    """
    scale = config.timescale or course.warmup or 10_000
    return lambda k: max(course.min_lr, course.lr / math.sqrt(1 + k / scale))


def fall_of(course: Course, config: "ScheduleConfig") -> tuple[float, float]:
    """Steps from the end of the warmup to the begin of the last fall, and its length."""
    length = config.fall_steps or config.decay_share * course.span
    length = min(float(length), course.span)
    return course.span - length, length


def fallen(high: float, low: float, done: float, form: str) -> float:
    """The rate between `high` and `low` when the share `done` of the fall lies behind."""
    u = min(1.0, max(0.0, done))
    if form == "exponential":
        return float(high * (low / high) ** u) if high > low else high
    down = {"linear": u, "cosine": 1 - half_cosine(u), "one_minus_sqrt": math.sqrt(u)}[form]
    # Exact at the end: low + (high - low) * 0, since high - (high - low) may miss low by a bit.
    return low if u == 1 else high - (high - low) * down


def half_cosine(done: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


SHAPES: dict[str, Callable[[Course, "ScheduleConfig"], Shape]] = {
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "constant": constant,
    "wsd": warmup_stable_decay,
    "infinite": infinite,
    "cosine_restarts": cosine_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
}
"""Name -> the course and the config make the shape."""
