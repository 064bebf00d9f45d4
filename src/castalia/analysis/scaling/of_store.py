"""Points from results tables: one number of each model, at its last step or also before."""

import math
from collections.abc import Sequence
from typing import Any

from castalia.analysis.scaling.points import NOT_DECAYED, Point, Points
from castalia.core.errors import DataError, nearest
from castalia.results.schema import CONDITIONS
from castalia.results.store import ResultsStore

UNIT = ("suite", "model", "variant", "seed")
"""What tells two training runs apart."""
FIELDS = (
    *UNIT,
    *("step", "last_step", "parameters", "tokens", "task", "metric", "filter"),
    *(name for name in CONDITIONS),
    *("value", "higher_is_better"),
)


def points_of_stores(
    stores: Sequence[ResultsStore],
    metric: str,
    *,
    from_step: int | None = None,
    where: str | None = None,
) -> Points:
    """A point for the last step of each model, or for each step from `from_step` on.

    metric  METRIC or TASK/METRIC, or a task with one metric. Of one that is better when it is
            higher and lies in [0, 1], such as acc, the law is fitted to 1 - value.
    where   SQL condition on the columns of the table, such as "shots = 0".
    Raises  DataError if no row has the metric, or several numbers of one checkpoint have it.
    """
    rows = [row for store in stores for row in read_rows(store, where)]
    chosen = choose_metric(rows, metric)
    notes: list[str] = []
    # Published suites may not say their tokens; a law of the sizes alone does not need them.
    is_known = any(row["tokens"] for row in chosen)
    usable = [row for row in chosen if row["parameters"] and (row["tokens"] or not is_known)]
    if len(usable) < len(chosen):
        notes.append(
            f"Left out: {len(chosen) - len(usable)} rows without parameters or tokens (or of step"
            " 0)."
        )
    usable, more = at_steps(usable, from_step)
    require_one_each(usable)
    words = f"{usable[0]['task']}/{usable[0]['metric']}" if usable else metric
    inverted = any(row["higher_is_better"] for row in usable)
    if inverted and not all(0 <= row["value"] <= 1 for row in usable):
        raise DataError(
            f"{words} is better when it is higher and not in [0, 1]; a scaling law needs a number"
            " that falls towards a floor"
        )
    names = model_names(usable)
    points = [point_of(row, name, inverted) for row, name in zip(usable, names, strict=True)]
    return Points(points, f"1 - {words}" if inverted else words, "all parameters", notes + more)


def read_rows(store: ResultsStore, where: str | None) -> list[dict[str, Any]]:
    """The rows of one table as dicts.

    Raises  DataError for a damaged table, or a condition that DuckDB refuses.
    """
    condition = f" WHERE ({where})" if where else ""
    names, rows = store.query(f"SELECT {', '.join(FIELDS)} FROM results{condition}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def choose_metric(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The rows of one task and metric.

    Raises  DataError with what there is.
    """
    have = {f"{row['task']}/{row['metric']}" for row in rows}
    fitting = {name for name in have if metric in (name, *name.rsplit("/", 1))}
    if len(fitting) != 1:
        some = ", ".join(sorted(fitting or have)[:12]) or "no rows"
        problem = (
            f"--metric {metric}: several numbers have this name"
            if fitting
            else (f"--metric {metric}: no such number in the results{nearest(metric, have)}")
        )
        raise DataError(f"{problem}; write TASK/METRIC, one of: {some}")
    (name,) = fitting
    return [row for row in rows if f"{row['task']}/{row['metric']}" == name]


def unit_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The training run of a row."""
    return tuple(row[name] for name in UNIT)


def at_steps(
    rows: list[dict[str, Any]], from_step: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the last step of each run, or of all steps from one on."""
    if from_step is not None:
        return [row for row in rows if (row["step"] or 0) >= from_step], [NOT_DECAYED]
    newest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        newest[unit_of(row)] = max(newest.get(unit_of(row), 0), row["step"] or 0)
    last = [row for row in rows if (row["step"] or 0) == newest[unit_of(row)]]
    done = [row for row in last if (row["step"] or 0) >= (row["last_step"] or 0)]
    others = sorted({str(row["model"]) for row in last} - {str(row["model"]) for row in done})
    if not others:
        return done, []
    if not done:
        raise DataError(
            f"no model was evaluated at its last step: {', '.join(others)}; evaluate it, or give"
            " --from-step to use the steps on the way"
        )
    return done, [
        "Left out, since they were not evaluated at their last step, where the learning rate has"
        f" decayed: {', '.join(others)}."
    ]


def require_one_each(rows: list[dict[str, Any]]) -> None:
    """Raise DataError if a checkpoint has several numbers, naming the columns that differ."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (*unit_of(row), row["step"])
        other = first.setdefault(key, row)
        differing = [
            f"{name} ({other[name]}, {row[name]})"
            for name in ("filter", *CONDITIONS)
            if other[name] != row[name]
        ]
        if other is not row:
            raise DataError(
                f"{row['model']} has several numbers at step {row['step']}, which differ in"
                f" {'; '.join(differing) or 'nothing but their value'}; choose with --where, such"
                ' as --where "shots = 0"'
            )


def model_names(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names of model and run, as long as they need to be to tell them apart."""
    suites = {row["suite"] for row in rows}
    seeds: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        seeds.setdefault(unit_of(row)[:-1], set()).add(row["seed"])
    names: list[tuple[str, str]] = []
    for row in rows:
        model = str(row["model"]) if len(suites) == 1 else f"{row['suite']}/{row['model']}"
        if row["variant"]:
            model += f" {row['variant']}"
        is_only = len(seeds[unit_of(row)[:-1]]) == 1
        run = model if is_only else f"{model} seed {row['seed']}"
        names.append((model, run))
    return names


def point_of(row: dict[str, Any], names: tuple[str, str], inverted: bool) -> Point:
    """One row as a point."""
    value = 1 - row["value"] if inverted else row["value"]
    tokens = float(row["tokens"]) if row["tokens"] else math.nan
    return Point(*names, float(row["parameters"]), tokens, value, row["step"])
