"""A fit as JSON values, for `--json` and for the page. NaN and infinity, which JSON lacks, are
null."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from castalia.analysis.scaling.bootstrap import INTERVAL, bounds
from castalia.analysis.scaling.fit import Prediction, ScalingFit, relative
from castalia.analysis.scaling.law import Array
from castalia.analysis.scaling.points import Point, column, groups
from castalia.monitor import quantity

PLACES_OF_A_CURVE = 40
MOST_CURVES = 12
BEYOND = 10.0
"""How far a curve goes beyond the points, as a factor."""
BUDGETS = (1.0, 10.0, 100.0)
"""Budgets of the frontier without others: as multiples of the largest of the points."""
DIGITS = 8
"""Significant digits."""


def fit_values(
    fit: ScalingFit,
    places: Sequence[tuple[float | None, float | None]] = (),
    budgets: Sequence[float] = (),
) -> dict[str, Any]:
    """Everything about a fit.

    places   parameters and tokens to predict the loss of.
    budgets  FLOPs of the compute-optimal frontier.
    Raises   ConfigError as `ScalingFit.predict`.
    """
    return {
        "formula": fit.law.formula,
        "metric": fit.source.metric,
        "parameters_counted": fit.source.counted,
        "variables": list(fit.law.variables),
        "numbers": number_values(fit),
        "interval": INTERVAL,
        "replicates": 0 if fit.replicates is None else len(fit.replicates.numbers),
        "objective": number(fit.objective),
        "points": point_values(fit, fit.points),
        "residual_rms": number(float(np.sqrt(np.mean(fit.residuals**2)))),
        "held_out": held_out_values(fit),
        "predictions": [prediction_values(fit.predict(*place)) for place in places],
        "curves": curve_values(fit, places),
        "frontier": frontier_values(fit, budgets),
        "notes": fit.notes,
    }


def number(value: float | None) -> float | None:
    """A number with DIGITS digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def numbers(values: Array) -> list[float | None]:
    """A vector."""
    return [number(value) for value in values.tolist()]


def number_values(fit: ScalingFit) -> dict[str, dict[str, float | None]]:
    """E, A, alpha, B and beta with interval and standard error."""
    rows: dict[str, dict[str, float | None]] = {}
    intervals = fit.intervals
    errors = fit.standard_errors
    for name in fit.law.names:
        low, high = intervals.get(name, (None, None))
        rows[name] = {
            "value": number(float(fit.law.number(name))),
            "low": number(low),
            "high": number(high),
            "stderr": number(errors.get(name)),
        }
        if name not in ("alpha", "beta"):
            rows[name]["log"] = number(float(fit.law.log_number(name)))
    return rows


def point_values(fit: ScalingFit, points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points, the law at them, and what is left: residual = loss / fitted - 1."""
    if not points:
        return []
    residuals = relative(fit.law, points)
    rows: list[dict[str, Any]] = []
    for point, residual in zip(points, residuals.tolist(), strict=True):
        rows.append(
            {
                "model": point.model,
                "run": point.run,
                "step": point.step,
                "parameters": number(point.parameters),
                "tokens": number(point.tokens),
                "flops": number(6 * point.parameters * point.tokens),
                "loss": number(point.loss),
                "fitted": number(point.loss / (1 + residual)),
                "residual": number(residual),
            }
        )
    return rows


def held_out_values(fit: ScalingFit) -> list[dict[str, Any]]:
    """The points held out, with the prediction's interval; `residual` is its error."""
    rows = point_values(fit, fit.held_out)
    for row, point in zip(rows, fit.held_out, strict=True):
        prediction = fit.predict(*place_of(fit, point))
        row["low"] = number(prediction.low)
        row["high"] = number(prediction.high)
    return rows


def place_of(fit: ScalingFit, point: Point) -> tuple[float | None, float | None]:
    """Where to predict a point: without the variable that the law has not."""
    parameters = point.parameters if "parameters" in fit.law.variables else None
    tokens = point.tokens if "tokens" in fit.law.variables else None
    return parameters, tokens


def prediction_values(prediction: Prediction) -> dict[str, float | None]:
    """A prediction."""
    return {name: number(value) for name, value in prediction._asdict().items()}


def curve_values(
    fit: ScalingFit, places: Sequence[tuple[float | None, float | None]]
) -> list[dict[str, Any]]:
    """The law as curves with bands: loss by tokens for each size, or by the one variable.

    The size or tokens outside of the law are those of the points.
    """
    points = [*fit.points, *fit.held_out]
    sizes = column(points, "parameters")
    tokens = column(points, "tokens")
    if fit.law.variables == ("parameters",):
        asked = [place[0] for place in places if place[0]]
        axis = reach(np.append(sizes, asked))
        return [curve(fit, "law", axis, np.full(len(axis), np.median(tokens)))]
    axis = reach(np.append(tokens, [place[1] for place in places if place[1]]))
    if fit.law.variables == ("tokens",):
        return [curve(fit, "law", np.full(len(axis), np.median(sizes)), axis)]
    wanted = np.append(sizes, [place[0] for place in places if place[0]])
    firsts = [float(wanted[group[0]]) for group in groups(wanted)]
    if len(firsts) > MOST_CURVES:
        chosen = np.linspace(0, len(firsts) - 1, MOST_CURVES).round().astype(int)
        firsts = [firsts[place] for place in chosen]
    return [curve(fit, quantity(size), np.full(len(axis), size), axis) for size in firsts]


def reach(values: Array) -> Array:
    """Places from the smallest value to BEYOND the largest, evenly in their logarithm."""
    return np.geomspace(float(values.min()) / 2, float(values.max()) * BEYOND, PLACES_OF_A_CURVE)


def curve(fit: ScalingFit, name: str, parameters: Array, tokens: Array) -> dict[str, Any]:
    """One curve."""
    values: dict[str, Any] = {
        "name": name,
        "parameters": numbers(parameters),
        "tokens": numbers(tokens),
        "flops": numbers(6 * parameters * tokens),
        "loss": numbers(fit.law.loss(parameters, tokens)),
        "low": None,
        "high": None,
    }
    if fit.replicates is not None:
        low, high = bounds(fit.replicates.loss(parameters, tokens))
        values["low"] = numbers(low)
        values["high"] = numbers(high)
    return values


def frontier_values(fit: ScalingFit, budgets: Sequence[float]) -> dict[str, Any] | None:
    """The compute-optimal frontier; None where the law has none."""
    points = [*fit.points, *fit.held_out]
    if len(fit.law.variables) < 2:
        return None
    largest = float((6 * column(points, "parameters") * column(points, "tokens")).max())
    compute = np.array(budgets or [factor * largest for factor in BUDGETS], np.float64)
    optimum = fit.optimum(compute)
    if optimum is None:
        return None
    low, high = optimum.interval or (None, None)
    slopes = optimum.exponent_interval or (None, None)
    return {
        "compute": numbers(compute),
        "parameters": numbers(optimum.parameters),
        "parameters_low": None if low is None else numbers(low),
        "parameters_high": None if high is None else numbers(high),
        "tokens": numbers(optimum.tokens),
        "tokens_per_parameter": numbers(optimum.tokens / optimum.parameters),
        "loss": numbers(optimum.loss),
        "exponent": number(optimum.exponent),
        "exponent_low": number(slopes[0]),
        "exponent_high": number(slopes[1]),
    }
