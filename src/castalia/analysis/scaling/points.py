"""`Point`: the loss of a model of some size after some tokens. `Points`: those of a suite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from castalia.analysis.scaling.law import Array, Variable
from castalia.core.errors import ConfigError, DataError
from castalia.monitor import quantity

SAME = 1.01
"""Factor up to which two sizes, or two numbers of tokens, count as the same one."""
NOT_DECAYED = (
    "Steps on the way are in the fit. The learning rate has not decayed there, and their loss is"
    " higher than that of a run of that length."
)
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


class Point(NamedTuple):
    """One number of one checkpoint."""

    model: str
    """What is held out together: the model, of any seed."""
    run: str
    """What the bootstrap draws: points of one run are not independent."""
    parameters: float
    tokens: float
    loss: float
    step: int | None = None


@dataclass
class Points:
    """The points of a fit, and how they came about."""

    points: list[Point]
    metric: str
    """What `loss` is, in words, with its unit."""
    counted: str = "all parameters"
    """What N counts, in words."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader."""


def column(points: Sequence[Point], name: Variable | str) -> Array:
    """One field of the points as a vector (S,)."""
    return np.array([getattr(point, name) for point in points], np.float64)


def checked(points: Sequence[Point], where: str) -> list[Point]:
    """The points, if every number of them is finite and positive.

    The tokens of all may be NaN: unknown, and taken as equal.
    Raises  DataError: the law is fitted to logarithms.
    """
    names = ["parameters", "tokens", "loss"]
    if are_unknown(column(points, "tokens")):
        names.remove("tokens")
    for point in points:
        for name in names:
            value = getattr(point, name)
            if not (math.isfinite(value) and value > 0):
                raise DataError(
                    f"{where}: {name} of {point.run} is {value:g}; a scaling law needs finite"
                    " numbers above 0; leave this run out"
                )
    return list(points)


def are_unknown(values: Array) -> bool:
    """Whether no value is known."""
    return len(values) > 0 and bool(np.isnan(values).all())


def groups(values: Array) -> list[list[int]]:
    """Indices of the values that count as the same, by ascending value."""
    if are_unknown(values):
        return [list(range(len(values)))]
    made: list[list[int]] = []
    for place in np.argsort(values, kind="stable").tolist():
        if made and values[place] <= SAME * values[made[-1][0]]:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def parse_number(text: str, what: str) -> float:
    """`1.4B`, `300e9` or `70M` as a number.

    Raises  ConfigError naming `what`.
    """
    plain = text.strip().lower().replace(",", "").replace("_", "")
    factor = SUFFIXES.get(plain[-1:], 1.0)
    try:
        value = float(plain[:-1] if factor != 1 else plain) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{what}: expected a number above 0 such as 1.4B or 300e9, got {text!r}")
    return value


def parse_place(text: str) -> tuple[float | None, float | None]:
    """`1.4B:300B` as parameters and tokens; `1.4B` or `:300B` leave one out.

    Raises  ConfigError.
    """
    first, _, second = text.partition(":")
    parameters = parse_number(first, f"--predict {text}") if first.strip() else None
    tokens = parse_number(second, f"--predict {text}") if second.strip() else None
    if parameters is None and tokens is None:
        raise ConfigError(f"--predict {text!r}: expected N:D such as 1.4B:300B")
    return parameters, tokens


def listed(points: Sequence[Point], name: Variable) -> str:
    """The distinct sizes or numbers of tokens with their runs, for an error."""
    values = column(points, name)
    parts: list[str] = []
    for places in groups(values):
        runs = dict.fromkeys(points[place].run for place in places)
        names = ", ".join(list(runs)[:3]) + (", …" if len(runs) > 3 else "")
        parts.append(f"{quantity(float(values[places[0]]))} ({names})")
    return "; ".join(parts[:8]) + ("; …" if len(parts) > 8 else "")
