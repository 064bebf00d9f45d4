"""`read_points`: what the command line names -> points."""

from collections.abc import Sequence
from pathlib import Path

from castalia.analysis.run_list import DEEPEST, run_folders
from castalia.analysis.runs import no_run, read_runs
from castalia.analysis.scaling.of_csv import points_of_csv
from castalia.analysis.scaling.of_runs import RUN_METRICS, points_of_runs
from castalia.analysis.scaling.of_store import points_of_stores
from castalia.analysis.scaling.points import Points
from castalia.core.errors import ConfigError, DataError
from castalia.results.store import FILE, ResultsStore


def read_points(
    paths: Sequence[str | Path],
    metric: str = "loss",
    *,
    from_step: int | None = None,
    embeddings: bool = True,
    where: str | None = None,
) -> Points:
    """Read the points of a fit.

    paths   runs or folders of runs; results tables, or for a metric other than the loss the runs
            whose tables have it; or CSV files.
    Raises  DataError if a path is none of these, or does not have the numbers; ConfigError for
            paths of several kinds, or an option that does not fit them.
    """
    places = [Path(path) for path in paths]
    tables = [path for path in places if path.suffix.lower() == ".csv"]
    stores = [store for path in places for store in stores_of(path, metric)]
    others = [path for path in places if path not in tables and not stores_of(path, metric)]
    kinds = {"CSV": tables, "results": stores, "runs": others}
    used = [kind for kind, found in kinds.items() if found]
    if len(used) > 1:
        raise ConfigError(f"the paths are of several kinds, {' and '.join(used)}; fit each alone")
    if not embeddings and not others:
        raise ConfigError(
            "--no-embeddings: only the configs of runs say which parameters are embeddings; write"
            " the numbers to a CSV file"
        )
    if where and not stores:
        raise ConfigError("--where chooses rows of results tables, and no path is one")
    if tables:
        return joined([points_of_csv(path, metric) for path in tables])
    if stores:
        return points_of_stores(stores, metric, from_step=from_step, where=where)
    if metric not in RUN_METRICS:
        raise DataError(
            f"--metric {metric}: {', '.join(map(str, others))} have no results table with it;"
            f" evaluate them, or choose one of {', '.join(RUN_METRICS)}"
        )
    runs = read_runs([run for path in others for run in runs_below(path)])
    return points_of_runs(runs, metric, from_step=from_step, embeddings=embeddings)


def stores_of(path: Path, metric: str) -> list[ResultsStore]:
    """The results tables that a path names."""
    if path.name == FILE or path.suffix == ".parquet":
        return [ResultsStore(path.parent)]
    if (path / FILE).is_file():
        return [ResultsStore(path)]
    if metric in RUN_METRICS or not path.is_dir():
        return []
    folders = [path, *run_folders(path, DEEPEST)]
    found = [folder / "evals" for folder in dict.fromkeys(folders)]
    return [ResultsStore(folder) for folder in found if (folder / FILE).is_file()]


def runs_below(path: Path) -> list[Path]:
    """The runs that a path names: itself, or those below a folder.

    Raises  DataError if there are none.
    """
    folder = path.parent if path.is_file() else path
    if (folder / "metrics.jsonl").exists() or not folder.is_dir():
        return [path]  # `read_runs` says what is wrong with it
    found = sorted(run_folders(folder, DEEPEST))
    if not found:
        raise DataError(no_run(folder))
    # A run that has not made a step yet has nothing to say.
    return [run for run in found if (run / "metrics.jsonl").exists()]


def joined(parts: Sequence[Points]) -> Points:
    """The points of several files as one, of which lines without a name stay apart."""
    points = [point for part in parts for point in part.points]
    return Points(points, parts[0].metric, parts[0].counted)
