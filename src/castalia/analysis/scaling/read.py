"""`read_points`: what the command line names -> points."""

from collections.abc import Sequence
from pathlib import Path

from castalia.analysis.inputs import find_inputs
from castalia.analysis.runs import read_runs
from castalia.analysis.scaling.of_csv import points_of_csv
from castalia.analysis.scaling.of_runs import RUN_METRICS, points_of_runs
from castalia.analysis.scaling.of_store import points_of_stores
from castalia.analysis.scaling.points import Points
from castalia.core.errors import ConfigError, DataError


def read_points(
    paths: Sequence[str | Path],
    metric: str = "loss",
    *,
    from_step: int | None = None,
    embeddings: bool = True,
    where: str | None = None,
) -> Points:
    """Read the points of a fit.

    paths   runs or folders of runs, results tables, or CSV files. The loss of a run or suite is
            read from its runs, any other metric from the tables in it.
    Raises  DataError if a path is none of these, or does not have the numbers; ConfigError for
            paths of several kinds, or an option that does not fit them.
    """
    places = [Path(path) for path in paths]
    tables = [path for path in places if path.suffix.lower() == ".csv"]
    if tables and len(tables) < len(places):
        raise ConfigError("the paths are CSV files and others; fit each kind alone")
    if tables and from_step is not None:
        raise ConfigError("--from-step: every row of a CSV file is a point; leave rows out there")
    inputs = find_inputs(path for path in places if path not in tables)
    is_of_runs = bool(inputs.runs) and metric in RUN_METRICS
    if not embeddings and not is_of_runs:
        raise ConfigError(
            "--no-embeddings: only the configs of runs say which parameters are embeddings; write"
            " the numbers to a CSV file"
        )
    if where and (is_of_runs or not inputs.stores):
        raise ConfigError("--where chooses rows of results tables, and none is read")
    if tables:
        return joined([points_of_csv(path, metric) for path in tables])
    if is_of_runs:
        runs = read_runs(inputs.runs)
        return points_of_runs(runs, metric, from_step=from_step, embeddings=embeddings)
    if not inputs.stores:
        read_runs(inputs.runs)  # says what is wrong with a path that is no run
        raise DataError(
            f"--metric {metric}: {', '.join(map(str, places))} have no results table; evaluate"
            f" them, or choose one of {', '.join(RUN_METRICS)}"
        )
    return points_of_stores(inputs.stores, metric, from_step=from_step, where=where)


def joined(parts: Sequence[Points]) -> Points:
    """The points of several files as one."""
    points = [point for part in parts for point in part.points]
    return Points(points, parts[0].metric, parts[0].counted)
