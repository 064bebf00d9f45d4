"""`fit_scaling`: points -> `ScalingFit`, the law with its intervals, predictions and residuals."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from castalia.analysis.scaling.bootstrap import bounds, draw_replicates, number_bounds, spread
from castalia.analysis.scaling.checks import choose_variables, doubts
from castalia.analysis.scaling.law import Array, Law, Variable
from castalia.analysis.scaling.points import SAME, Point, Points, checked, column, groups
from castalia.analysis.scaling.solve import Problem, fit_law
from castalia.core.errors import ConfigError, DataError, nearest
from castalia.monitor import quantity

LARGEST = "largest"
REPLICATES = 200
FEW_RUNS = 8
"""Runs below which a bootstrap over them is rough."""


class Prediction(NamedTuple):
    """The law at one place. The interval is that of the law, without the scatter of a run."""

    parameters: float | None
    tokens: float | None
    loss: float
    low: float | None
    high: float | None
    beyond: float
    """How far outside of the points it lies, as a factor in N or D; 1 inside of them."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law and the points it was fitted to."""

    law: Law
    objective: float
    """Sum of the Huber losses of log loss."""
    source: Points
    """The points of the fit, without those held out."""
    held_out: list[Point]
    replicates: Law | None
    """The laws of the bootstrap, as a batch; None without a bootstrap."""
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """The points of the fit."""
        return self.source.points

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% percentile interval of each number of the law; {} without a bootstrap."""
        return {} if self.replicates is None else number_bounds(self.replicates)

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """The standard deviation of each number over the replicates."""
        if self.replicates is None:
            return {}
        return {name: spread(self.replicates.number(name)) for name in self.law.names}

    @property
    def residuals(self) -> Array:
        """(S,) relative difference of each point from the law: loss / law - 1."""
        return relative(self.law, self.points)

    def predict(self, parameters: float | None, tokens: float | None) -> Prediction:
        """The loss of the law, with its interval.

        Raises  ConfigError if a variable of the law is missing, or another one is given that
                differs from that of the points.
        """
        place = {"parameters": parameters, "tokens": tokens}
        beyond = 1.0
        for name, value in place.items():
            beyond = max(beyond, self.checked_place(name, value))
        logs = [np.log([float(place[name] or 0)]) for name in self.law.variables]
        loss = float(np.exp(self.law.log_loss(logs))[0])
        if self.replicates is None:
            return Prediction(parameters, tokens, loss, None, None, beyond)
        low, high = bounds(np.exp(self.replicates.log_loss(logs))[:, 0])
        return Prediction(parameters, tokens, loss, float(low), float(high), beyond)

    def checked_place(self, name: str, value: float | None) -> float:
        """The factor by which a value lies outside of the points.

        Raises  ConfigError as `predict`.
        """
        values = column(self.points, name)
        if name in self.law.variables:
            if value is None:
                raise ConfigError(f"predict: {self.law.formula} needs the {name}; write N:D")
            return max(value / float(values.max()), float(values.min()) / value, 1.0)
        lone = len(groups(values)) == 1
        if value is not None and lone and abs(np.log(value / values[0])) > np.log(SAME):
            raise ConfigError(
                f"predict: every point has {quantity(float(values[0]))} {name}, so that the law"
                f" says nothing about {quantity(value)}; add runs of other {name}"
            )
        return 1.0

    def optimum(self, compute: Array) -> "Optimum | None":
        """The model and tokens of the lowest loss for budgets of C = 6 N D FLOPs, (K,).

        None where the law has no optimum: with one variable, or an exponent that is not positive.
        """
        if len(self.law.variables) < 2:
            return None
        parameters, tokens = self.law.optimum(compute)
        if not np.isfinite(parameters).all():
            return None
        alpha = float(self.law.number("alpha"))
        beta = float(self.law.number("beta"))
        interval = None
        exponents = None
        if self.replicates is not None:
            interval = bounds(np.nan_to_num(self.replicates.optimum(compute)[0], nan=np.inf))
            slopes = self.replicates.number("beta") / (
                self.replicates.number("alpha") + self.replicates.number("beta")
            )
            exponents = tuple(float(bound) for bound in bounds(slopes))
        loss = self.law.loss(parameters, tokens)
        return Optimum(
            compute, parameters, tokens, loss, interval, beta / (alpha + beta), exponents
        )

    def data(self) -> dict[str, Any]:
        """The fit as JSON values: see `castalia.analysis.scaling.values`."""
        from castalia.analysis.scaling.values import fit_values

        return fit_values(self)


class Optimum(NamedTuple):
    """The compute-optimal frontier at some budgets; vectors (K,)."""

    compute: Array
    parameters: Array
    tokens: Array
    loss: Array
    interval: tuple[Array, Array] | None
    """Of `parameters`."""
    exponent: float
    """Of N ~ C^a; that of the tokens is 1 - a."""
    exponent_interval: tuple[float, ...] | None


def relative(law: Law, points: Sequence[Point]) -> Array:
    """(S,) loss / law - 1."""
    fitted = law.loss(column(points, "parameters"), column(points, "tokens"))
    return column(points, "loss") / fitted - 1


def fit_scaling(
    source: Points,
    *,
    law: str = "auto",
    hold_out: Sequence[str] = (),
    bootstrap: int = REPLICATES,
    seed: int = 0,
) -> ScalingFit:
    """Fit loss = E + A/N^alpha + B/D^beta.

    law        auto takes the terms whose variable differs between the points; both, parameters or
               tokens say so.
    hold_out   models that are left out of the fit; "largest" names those of the largest size.
    bootstrap  replicates behind the intervals; 0 for none.
    Raises     DataError for too few sizes or points, or a number that is not finite and positive;
               ConfigError for an unknown law or model.
    Source     Hoffmann et al. 2022, arXiv:2203.15556, section 3.3.
    """
    whole = sorted(checked(source.points, source.metric), key=by_size)
    kept, held = split(whole, hold_out)
    variables, notes = choose_variables(kept, law)
    logs = [np.log(column(kept, name)) for name in variables]
    problem = Problem(variables, logs, column(kept, "loss"))
    replicates, refused = draw_replicates(kept, variables, bootstrap, seed)
    fitted, objective, laws = fit_law(problem, replicates)
    notes += bootstrap_notes(kept, bootstrap, len(replicates), refused)
    fit = ScalingFit(fitted, objective, replace(source, points=kept), held, laws)
    notes += doubts(fitted, kept, fit.intervals)
    return replace(fit, notes=[*source.notes, *notes])


def by_size(point: Point) -> tuple[float, float, str]:
    """The order of the points in tables."""
    return point.parameters, point.tokens, point.run


def split(points: list[Point], hold_out: Sequence[str]) -> tuple[list[Point], list[Point]]:
    """The points to fit, and those held out.

    Raises  ConfigError for an unknown model; DataError if nothing is left.
    """
    names = {point.model for point in points} | {point.run for point in points}
    out: set[int] = set()
    for name in hold_out:
        if name == LARGEST and LARGEST not in names:
            out |= largest(points)
            continue
        if name not in names:
            raise ConfigError(
                f"--hold-out {name!r}: no such model{nearest(name, names)}; have"
                f" {', '.join(sorted({point.model for point in points}))}, or {LARGEST}"
            )
        out |= {i for i, point in enumerate(points) if name in (point.model, point.run)}
    kept = [point for i, point in enumerate(points) if i not in out]
    if points and not kept:
        raise DataError("every model is held out; leave some to fit")
    return kept, [points[i] for i in sorted(out)]


def largest(points: list[Point]) -> set[int]:
    """Indices of the points of the largest size; of the most tokens, if there is one size."""
    if not points:
        return set()
    name: Variable = "parameters"
    if len(groups(column(points, name))) == 1:
        name = "tokens"
    return set(groups(column(points, name))[-1])


def bootstrap_notes(points: list[Point], asked: int, made: int, refused: int) -> list[str]:
    """Sentences about the bootstrap."""
    if not asked:
        return []
    runs = len({point.run for point in points})
    if not made:
        return [f"No intervals: the points are of {runs} runs, too few to draw others from them."]
    notes: list[str] = []
    if runs < FEW_RUNS:
        notes.append(f"The intervals are rough: a bootstrap over {runs} runs sees few of them.")
    if made < asked:
        notes.append(f"The intervals rest on {made} replicates of {asked}: too few runs.")
    if refused > asked / 10:
        notes.append(
            f"{refused} of {asked + refused} draws had too few sizes for the law and were drawn"
            " again."
        )
    return notes
