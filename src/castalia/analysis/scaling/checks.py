"""Which law the points can hold, and what the fitted numbers do not say."""

from collections.abc import Sequence

import numpy as np

from castalia.analysis.scaling.law import SYMBOLS, Array, Law, Variable
from castalia.analysis.scaling.points import Point, are_unknown, column, groups, listed
from castalia.analysis.scaling.solve import EXPONENTS
from castalia.core.errors import ConfigError, DataError
from castalia.monitor import quantity

LAWS: dict[str, tuple[Variable, ...]] = {
    "both": ("parameters", "tokens"),
    "parameters": ("parameters",),
    "tokens": ("tokens",),
}
LEAST_VALUES = 3
"""Distinct sizes, or numbers of tokens, for a coefficient and an exponent beside E."""
NOUNS: dict[Variable, str] = {"parameters": "model sizes", "tokens": "numbers of tokens"}
UNSEEN = 1e-3
"""Part of the loss below which a term, or E, is not seen in the points."""
WIDE = 10.0
"""Ratio of an exponent's bounds from which it counts as not identified."""
ALIKE = 0.995
"""Correlation of log N with log D from which the two terms are hard to tell apart."""


def choose_variables(points: Sequence[Point], law: str) -> tuple[tuple[Variable, ...], list[str]]:
    """What the loss depends on, with sentences about what is left out.

    law     "auto", or a key of LAWS.
    Raises  ConfigError for another word; DataError for too few points.
    """
    if law not in ("auto", *LAWS):
        raise ConfigError(f"law {law!r}: expected auto, {', '.join(LAWS)}")
    counts = {name: len(groups(column(points, name))) for name in LAWS["both"]}
    variables = LAWS.get(law, LAWS["both"])
    if law == "auto" and max(counts.values()) > 1:
        variables = tuple(name for name in variables if counts[name] > 1)
    for name in variables:
        if counts[name] < LEAST_VALUES:
            raise DataError(too_few(points, name, counts[name], variables))
    least = 2 * len(variables) + 2
    if len(points) < least:
        raise DataError(
            f"{Law(variables, np.empty(0)).formula} has {least - 1} numbers to fit and needs at"
            f" least {least} points, got {len(points)} ({listed(points, variables[0])}); add runs"
        )
    return variables, left_out(points, variables, counts)


def too_few(
    points: Sequence[Point], name: Variable, count: int, variables: tuple[Variable, ...]
) -> str:
    """What to say of a variable with too few values."""
    symbol, coefficient, exponent = SYMBOLS[name]
    text = (
        f"{coefficient}/{symbol}^{exponent} needs at least {LEAST_VALUES} {NOUNS[name]}, got"
        f" {count}: {listed(points, name) or 'no points'}; add runs"
    )
    others = [other for other in variables if other != name]
    if others and count > 1:
        text += f", or keep the runs of one {symbol} and fit the law of {others[0]} alone"
    return text


def left_out(
    points: Sequence[Point], variables: tuple[Variable, ...], counts: dict[Variable, int]
) -> list[str]:
    """Sentences about a variable outside of the law, and about two that go together."""
    notes: list[str] = []
    for name in LAWS["both"]:
        if name in variables:
            continue
        symbol, coefficient, exponent = SYMBOLS[name]
        values = column(points, name)
        text = f"{coefficient}/{symbol}^{exponent} is part of E: "
        if are_unknown(values):
            text += f"the {name} of the points are unknown, and taken as equal."
        elif counts[name] == 1:
            text += f"every point has the same {name}, {quantity(float(values[0]))}."
        else:
            text += (
                f"the law leaves {name} out, although they differ from"
                f" {quantity(float(values.min()))} to {quantity(float(values.max()))}."
            )
        notes.append(text)
    if len(variables) == 2:
        logs = [np.log(column(points, name)) for name in variables]
        if abs(float(np.corrcoef(logs[0], logs[1])[0, 1])) > ALIKE:
            notes.append(
                "D grows with N in all points (the ratio is nearly constant): the terms of N and D"
                " can hardly be told apart. Predictions at the same ratio hold better than A,"
                " alpha, B and beta."
            )
    return notes


def doubts(
    law: Law, points: Sequence[Point], intervals: dict[str, tuple[float, float]]
) -> list[str]:
    """Sentences about numbers of the fit that the points do not determine."""
    notes: list[str] = []
    lowest = float(column(points, "loss").min())
    floor = float(law.number("E"))
    if floor < 0.01 * lowest:
        notes.append(
            f"E is {floor:.2g}, next to nothing of the lowest loss {lowest:.4g}: the points show no"
            " floor, and the law far beyond them is a guess."
        )
    for name in law.variables:
        notes += doubts_of_term(law, name, column(points, name), lowest)
        _, _, exponent = SYMBOLS[name]
        low, high = intervals.get(exponent, (1.0, 1.0))
        if low <= 0 or high > WIDE * low:
            notes.append(
                f"{exponent} is hardly identified: its interval goes from {low:.3g} to {high:.3g}."
            )
    return notes


def doubts_of_term(law: Law, name: Variable, values: Array, lowest: float) -> list[str]:
    """Sentences about one term."""
    symbol, coefficient, exponent = SYMBOLS[name]
    fitted = float(law.number(exponent))
    logs = law.log_number(coefficient) - fitted * np.log(values)
    change = float(np.ptp(np.exp(np.minimum(logs, 700.0))))
    term = f"{coefficient}/{symbol}^{exponent}"
    if change < UNSEEN * lowest:
        return [
            f"{term} changes by {change / lowest:.2%} of the loss over these points: {coefficient}"
            f" and {exponent} are not identified."
        ]
    if fitted <= 0:
        return [
            f"{exponent} is {fitted:.3g}: the loss does not fall with {symbol} in these points."
        ]
    if fitted < EXPONENTS[0]:
        return [
            f"{exponent} is {fitted:.3g}, below the grid of starts ({EXPONENTS[0]:g} to"
            f" {EXPONENTS[-1]:g}): {term} is nearly a constant, which E cannot be told from."
        ]
    if fitted > EXPONENTS[-1]:
        return [
            f"{exponent} is {fitted:.3g}, above the grid of starts ({EXPONENTS[0]:g} to"
            f" {EXPONENTS[-1]:g}): {term} is seen at the smallest {symbol} alone."
        ]
    return []
