"""What the paths given to a report name: runs, suites of runs, and results stores."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from castalia.analysis.runs import RunFiles, read_runs
from castalia.core.errors import DataError
from castalia.results import ResultsStore, find_stores
from castalia.results.store import FILE

METRICS = "metrics.jsonl"
"""The file by which a folder in a suite is known as a run."""


class Inputs(NamedTuple):
    """What a page is about."""

    runs: list[Path]
    stores: list[ResultsStore]
    """Each once."""

    def read(self) -> tuple[list[RunFiles], list[ResultsStore]]:
        """The runs, read, and the stores.

        Raises  DataError if a run's folder holds neither metrics nor a summary, or a file in it is
                damaged.
        """
        return read_runs(self.runs), self.stores


def find_inputs(paths: Iterable[str | Path]) -> Inputs:
    """Runs and stores that paths name.

    paths  each a run, a folder of runs, a results store, its parquet file, or a file in a run such
           as RUN/config.yaml. A run and a suite bring the stores in their `evals` folders.
    """
    found = [inputs_at(Path(path)) for path in paths]
    # A run twice is a mistake, but a run and its suite are not: they name the same files.
    single = {named[0].resolve() for named, _ in found if len(named) == 1}
    runs: list[Path] = []
    stores: dict[Path, ResultsStore] = {}
    for named, inside in found:
        runs += [run for run in named if len(named) == 1 or run.resolve() not in single]
        stores |= {store.path.resolve(): store for store in inside}
    return Inputs(runs, list(stores.values()))


def inputs_at(path: Path) -> tuple[list[Path], list[ResultsStore]]:
    """Runs and stores of one path; what is neither is a run here, so that `read_run` explains."""
    if path.is_file() and path.suffix == Path(FILE).suffix:
        return [], find_stores(path)
    folder = path.parent if path.is_file() else path
    stores = stores_in(folder)
    if (folder / METRICS).exists() or (folder / "summary.json").exists():
        return [folder], stores
    runs = sorted(found.parent for found in folder.glob(f"*/{METRICS}"))
    if not runs and not stores:
        return [path], []
    return runs, stores


def stores_in(folder: Path) -> list[ResultsStore]:
    """The stores of a folder; most runs have none."""
    try:
        return find_stores(folder)
    except DataError:
        return []
