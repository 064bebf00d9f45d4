"""The runs below the folders that are viewed, each read again when its files change."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from castalia.analysis.inputs import stores_in
from castalia.analysis.live.growing import GrowingMetrics, GrowingMixture
from castalia.analysis.run_list import DEEPEST, run_folders, run_state
from castalia.analysis.runs import RunFiles, distinct_names, is_number, read_json
from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.hub import did_you_mean
from castalia.results import ResultsStore
from castalia.results.store import SUFFIX

FILES = (
    "metrics.jsonl",
    "mixture.jsonl",
    "events.jsonl",
    "summary.json",
    "config.yaml",
    "env.json",
    "evals/bits_per_byte.json",
    "evals/results.parquet",
    "samples/samples.json",
    "checkpoints",
)
"""What a page shows of a run; a change of one of them is a change of the page."""
MARKS = ("metrics.jsonl", "summary.json")
"""A folder with one of these is a run without a config, such as an older version wrote."""
SEARCH_SECONDS = 3.0
"""Time between two searches for new runs: a search walks through folders."""
EXPECTED = "a run, a folder of runs, or a results store"

FAULTS = (
    CastaliaError,
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading or drawing a file of another form than ours can raise."""

Stamps = tuple[tuple[str, int, int], ...]
"""Name, time of change in ns and size of each file that is there."""


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """The stamps of files, without opening any."""
    found = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        found.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(found)


class WatchedRun:
    """A run's folder and what was read of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = GrowingMetrics(folder / "metrics.jsonl")
        self.mixture = GrowingMixture(folder / "mixture.jsonl")
        self.files: RunFiles | None = None
        """None before the first step, and while a file is damaged."""
        self.error = ""
        """Why the run cannot be shown; "" if it can."""
        self.seen: Stamps | None = None

    def stamps(self) -> Stamps:
        """The stamps of its files, without opening any."""
        return stamps_of(self.folder / name for name in FILES)

    def read(self, name: str) -> None:
        """Read what has changed since the last call; `name` is the run's on the page."""
        stamps = self.stamps()
        if stamps != self.seen:
            # The stamps first: what changes while we read is read the next time.
            self.seen = stamps
            self.error = ""
            self.files = None
            try:
                self.files = self.whole(name)
            except FAULTS as error:
                # One damaged run must not take the page of the others.
                self.fail(error)
        if self.files is not None:
            self.files.name = name

    def fail(self, error: BaseException) -> None:
        """Leave the run out of the page until its files change."""
        self.files = None
        self.error = str(error)
        if not isinstance(error, CastaliaError):
            # A message of Python's own, such as a key that is missing, says little alone.
            self.error = f"a file of the run is damaged ({type(error).__name__}: {error})"

    def whole(self, name: str) -> RunFiles | None:
        """The run with all its files read; None before its first step.

        Raises  DataError for a damaged file, and what a JSON file of another form gives.
        """
        summary = read_json(self.folder / "summary.json") or {}
        self.metrics.update()
        self.mixture.update()
        if not self.metrics.records and not summary:
            return None
        run = RunFiles(self.folder, name, list(self.metrics.records), summary)
        run.columns = self.metrics.columns
        record = self.mixture.record
        run.mixture = record if record is not None and record.lines else None
        # Read here, where an error is this run's alone: the page asks for them later.
        for part in ("config", "events", "bits", "sources"):
            getattr(run, part)
        read_samples(self.folder)
        return run


class Watched:
    """Every run in the paths that a user named; new ones join."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.runs: dict[str, WatchedRun] = {}
        """By the name on the page."""
        self.stores: list[ResultsStore] = []
        self.problems: list[str] = []
        """What is wrong with stores, which are left out of the page."""
        self.checked: dict[Stamps, str] = {}
        self.searched = 0.0
        for path in self.paths:
            require_place(path)

    def search(self) -> None:
        """Look for runs that have appeared or gone, at most every few seconds."""
        if time.monotonic() - self.searched < SEARCH_SECONDS and self.searched:
            return
        named = [path for path in self.paths if path.suffix != SUFFIX]
        folders = [folder for path in named for folder in runs_in(path)]
        # One folder that two paths lead to is one run.
        unique = list({folder.resolve(): folder for folder in folders}.values())
        known = {run.folder: run for run in self.runs.values()}
        # New ones last, and old ones where they were: the colour of a run is its place.
        places = {folder: place for place, folder in enumerate(known)}
        unique.sort(key=lambda folder: places.get(folder, len(places)))
        names = distinct_names([folder.resolve() for folder in unique]) if unique else []
        self.runs = {
            name: known.get(folder) or WatchedRun(folder)
            for name, folder in zip(names, unique, strict=True)
        }
        around = [*self.paths, *(run.folder for run in self.runs.values())]
        stores = [store for place in around for store in stores_at(place)]
        self.stores = list({store.path.resolve(): store for store in stores}.values())
        self.searched = time.monotonic()

    def stamps(self) -> tuple[Any, ...]:
        """What changes when a file of a run or a store does."""
        self.search()
        runs = tuple((name, run.stamps()) for name, run in self.runs.items())
        return (*runs, *self.store_stamps())

    def store_stamps(self) -> Stamps:
        """The stamps of the stores' files."""
        return tuple(stamp for store in self.stores for stamp in stamps_of([store.path]))

    def read_stores(self) -> list[ResultsStore]:
        """The stores that can be read; `problems` says why the others cannot."""
        self.problems = []
        whole: list[ResultsStore] = []
        for store in self.stores:
            problem = self.problem_of(store)
            if problem:
                self.problems.append(problem)
            else:
                whole.append(store)
        return whole

    def problem_of(self, store: ResultsStore) -> str:
        """Why a store cannot be read; "" if it can. It is read when its file has changed."""
        stamps = stamps_of([store.path])
        if stamps not in self.checked:
            self.checked[stamps] = ""
            try:
                store.table()
            except CastaliaError as error:
                # Also where the extra is missing: the runs are shown without it.
                self.checked[stamps] = str(error)
        return self.checked[stamps]

    def read(self) -> list[RunFiles]:
        """The runs that can be shown, read as far as they have changed."""
        self.search()
        for name, run in self.runs.items():
            run.read(name)
        return [run.files for run in self.runs.values() if run.files is not None]

    def leave_out(self, draw: Callable[[RunFiles], Any]) -> int:
        """Leave out the runs that `draw` fails on alone; returns how many they are."""
        count = 0
        for run in self.runs.values():
            if run.files is None:
                continue
            try:
                draw(run.files)
            except FAULTS as error:
                run.fail(error)
                count += 1
        return count

    def states(self) -> list[dict[str, Any]]:
        """Of each run: name, state, step, loss, checkpoints, and its error."""
        return [state_of(name, run) for name, run in self.runs.items()]


def state_of(name: str, run: WatchedRun) -> dict[str, Any]:
    """How far a run is, as JSON values."""
    state: dict[str, Any] = {"name": name, "error": run.error}
    samples = run.folder / "samples" / "samples.json"
    state["samples"] = samples.is_file()
    state["sampled"] = str(samples.stat().st_mtime_ns) if state["samples"] else ""
    state["rows"] = (run.folder / "config.yaml").is_file()
    if not state["rows"]:
        # Without a config there is no plan to compare with.
        last = run.files.metrics[-1]["step"] if run.files and run.files.metrics else 0
        return state | {"state": "", "step": last, "steps": None, "loss": None, "checkpoints": []}
    found = run_state(run.folder)
    return state | {
        "state": found.state,
        "step": found.step,
        "steps": found.steps,
        "loss": found.loss if is_number(found.loss) else None,
        "checkpoints": found.checkpoints,
    }


def require_place(path: Path) -> None:
    """Raises  ConfigError if nothing at `path` can be viewed, or ever will be."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; {did_you_mean(path, f'expected {EXPECTED}')}")
    if stores_at(path) or (path.suffix != SUFFIX and runs_in(path)):
        return
    if path.is_dir() and not any(path.iterdir()):
        return  # an empty folder is one in which runs will appear
    raise ConfigError(f"nothing to view in {path}: expected {EXPECTED}")


def runs_in(path: Path) -> list[Path]:
    """The folders of the runs at `path` or below it, by path; a file in a run stands for it."""
    if path.is_file():
        # What lies around a file was not asked for.
        return sorted(runs_below(path.parent, 0))
    return sorted(runs_below(path, DEEPEST))


def runs_below(folder: Path, levels: int) -> Iterator[Path]:
    """As `run_folders`, with the runs that have no config."""
    if any((folder / mark).is_file() for mark in MARKS) or any(run_folders(folder, 0)):
        yield folder
        return
    if levels == 0:
        return
    try:
        inner = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:  # not readable, or gone since its parent was listed
        return
    for path in inner:
        if not path.name.startswith("."):
            yield from runs_below(path, levels - 1)


def stores_at(path: Path) -> list[ResultsStore]:
    """The stores of a path; most runs have none."""
    if path.is_file() and path.suffix != SUFFIX:
        return []
    return stores_in(path)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run; [] without any.

    Raises  DataError if the file is damaged; KeyError or TypeError if it has another form.
    """
    samples = read_json(folder / "samples" / "samples.json") or []
    return [
        {"step": int(each["step"]), "prompt": str(each["prompt"]), "text": str(each["text"])}
        for each in samples
    ]
