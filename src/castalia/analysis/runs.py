"""What a report reads of a run: the files of its folder, each of which may be absent."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.checkpoint import complete_steps
from castalia.config import read_yaml
from castalia.core.errors import CastaliaError, DataError
from castalia.core.hub import did_you_mean
from castalia.mixing import MixtureRecord, read_mixture
from castalia.models.families import build_model_config
from castalia.models.flops import flops_per_token
from castalia.monitor.sinks import read_metrics
from castalia.results import EVALS, ResultsStore

SOURCE = "bits_per_byte/"
"""Start of the name of a task in a results table: the bits per byte of a source."""
BITS = f"""
SELECT step, task, last(value ORDER BY evaluated_at NULLS FIRST) FROM results
WHERE starts_with(task, '{SOURCE}') AND metric = 'bits_per_byte' AND step IS NOT NULL
  AND task_version IS DISTINCT FROM 'validation'
GROUP BY step, task
"""
"""Without the rows of validations, whose numbers are in metrics.jsonl and have a panel."""
Vector = NDArray[np.float64]
Curve = tuple[Vector, Vector]
"""(S,) steps, ascending, and (S,) finite values at them."""


@dataclass
class RunFiles:
    """A run's folder, read."""

    folder: Path
    name: str
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl, by step."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json: title, lead, tiles and tables, as the demo writes them."""
    curves: dict[tuple[str, ...], Curve] = field(default_factory=dict)
    """Curves by their keys: panels, axes and tables ask for the same ones."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml; empty without one."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return {}
        return read_yaml(path)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The guard's decisions, from events.jsonl."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        # Not `train.read_events`, which repairs the file: the run may be writing it right now.
        return read_metrics(path)

    @cached_property
    def mixture(self) -> MixtureRecord | None:
        """The mixture's record; None without one, or without a recorded step."""
        path = self.folder / "mixture.jsonl"
        if not path.exists():
            return None
        record = read_mixture(path, strict=False)
        return record if record.lines else None

    @cached_property
    def checkpoints(self) -> list[int]:
        """Steps that were saved, of which retention may have removed some."""
        # The stall of a save is known after its own step's line is written, so it is in the next.
        saved = [line["step"] - 1 for line in self.metrics if "save_stall_seconds" in line]
        return sorted({*saved, *complete_steps(self.folder / "checkpoints")})

    @cached_property
    def flops_per_token(self) -> int | None:
        """FLOPs of one training token; None where the config does not say."""
        try:
            model = build_model_config(self.config["model"], f"{self.folder}/config.yaml")
            return flops_per_token(model, int(self.config["data"]["seq_length"]))
        except (CastaliaError, KeyError, TypeError, ValueError):
            # A page of curves is worth more than a complaint about a config of another version.
            return None

    @cached_property
    def bits(self) -> list[dict[str, Any]]:
        """The sweep's bits per byte, by step."""
        evals = self.json(EVALS, "bits_per_byte.json") or {}
        marks = evals.get("checkpoints") or self.stored_bits
        # Later sweeps may have appended earlier checkpoints.
        return sorted(marks, key=lambda mark: mark["step"])

    @cached_property
    def stored_bits(self) -> list[dict[str, Any]]:
        """Bits per byte by source of the run's results table, in the form of bits_per_byte.json."""
        store = ResultsStore(self.folder / EVALS)
        if not store.path.exists():
            return []
        marks: dict[int, dict[str, Any]] = {}
        for step, task, value in store.query(BITS)[1]:
            mark = marks.setdefault(step, {"step": step, "sources": {}})
            mark["sources"][task.removeprefix(SOURCE)] = {"bits_per_byte": value}
        return list(marks.values())

    @cached_property
    def sources(self) -> list[str]:
        """Names of the sources in any of the files, each once."""
        names: dict[str, None] = {}
        # The mixture's first: it has all of them, also those that no step has read.
        if self.mixture:
            names |= dict.fromkeys(self.mixture.sources)
        for key in ("sources", "valid_sources"):
            names |= dict.fromkeys(keys[1] for keys in self.columns.numbers if keys[0] == key)
        for mark in self.bits:
            names |= dict.fromkeys(mark["sources"])
        return list(names)

    def json(self, *parts: str) -> Any:
        """The JSON value in a file of the folder; None if it is missing."""
        return read_json(self.folder.joinpath(*parts))

    def curve(self, *keys: str) -> Curve:
        """The steps whose line has a finite number under the keys, and the numbers.

        keys  a key of the line and those inside it, such as "valid", "perplexity".
        """
        if keys not in self.curves:
            self.curves[keys] = self.columns.curve(keys)
        return self.curves[keys]

    @cached_property
    def columns(self) -> "Columns":
        """The numbers of the lines by their keys."""
        columns = Columns()
        columns.add(self.metrics)
        return columns


class Columns:
    """The finite numbers of lines by their keys, in one pass: a page asks for a hundred curves, and
    a run may have 143,000 lines."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        """Keys, one inside the other -> steps and values."""

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines, whose steps follow those of the lines before."""
        for line in lines:
            self.add_inside((), line["step"], line)

    def add_inside(self, keys: tuple[str, ...], step: int, values: dict[str, Any]) -> None:
        """Add the numbers of an object that stands under `keys`."""
        for name, value in values.items():
            if isinstance(value, dict):
                self.add_inside((*keys, name), step, value)
            elif is_number(value):
                place = (*keys, name)
                if place not in self.numbers:
                    self.numbers[place] = ([], [])
                steps, numbers = self.numbers[place]
                steps.append(step)
                numbers.append(value)

    def curve(self, keys: tuple[str, ...]) -> Curve:
        """The steps with a number under the keys, and the numbers."""
        steps, values = self.numbers.get(keys, ((), ()))
        return np.array(steps, np.float64), np.array(values, np.float64)


def inner(line: Any, keys: Sequence[str]) -> Any:
    """The value under nested keys; None where one is missing."""
    for key in keys:
        if not isinstance(line, dict):
            return None
        line = line.get(key)
    return line


def curve(points: Iterable[tuple[int, Any]]) -> Curve:
    """The points with a finite number, as two vectors."""
    kept = [(step, value) for step, value in points if is_number(value)]
    if not kept:
        return np.empty(0), np.empty(0)
    steps, values = np.array(kept, np.float64).T
    return steps, values


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return type(value) in (int, float) and math.isfinite(value)


def read_json(path: Path) -> Any:
    """The JSON value in a file; None if the file is missing.

    Raises  DataError if the file is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; delete it and create it again") from None


def read_run(path: str | Path) -> RunFiles:
    """Read a run's folder, or the folder of a file in it such as RUN/config.yaml.

    Raises  DataError if the folder holds neither metrics nor a summary, or a file in it is damaged.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    summary = read_json(folder / "summary.json") or {}
    metrics: list[dict[str, Any]] = []
    if (folder / "metrics.jsonl").exists():
        metrics = lines_by_step(folder / "metrics.jsonl")
    if not metrics and not summary:
        raise DataError(no_run(folder))
    return RunFiles(folder, summary.get("title", folder.resolve().name), metrics, summary)


def lines_by_step(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl by step; of two lines of one step, the later one counts.

    Raises  DataError if a line has no step.
    """
    lines: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(read_metrics(path), 1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise DataError(f"{path} line {number}: expected an object with a step, got {line!r}")
        lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def no_run(folder: Path) -> str:
    """What to say of a folder that is not a run's."""
    if not folder.exists():
        return f"{folder} does not exist; {did_you_mean(folder, 'expected the folder of a run')}"
    if (folder / "metrics.jsonl").exists():
        return f"{folder}/metrics.jsonl has no step yet; try again when the run has made one"
    inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
    if inside:
        some = ", ".join(inside[:5])
        if len(inside) > 5:
            some += ", …"
        return f"{folder} holds runs ({some}) but is none itself; name the runs: {folder}/*"
    return f"{folder} is not the folder of a run: it has neither metrics.jsonl nor summary.json"


def read_runs(paths: Sequence[str | Path]) -> list[RunFiles]:
    """Read several runs, with names that tell them apart.

    Raises  DataError as `read_run`, and about a run that is named twice.
    """
    runs = [read_run(path) for path in paths]
    folders = [run.folder.resolve() for run in runs]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise DataError(f"{runs[place].folder} is named twice; name each run once")
    if len(runs) > 1:
        for run, name in zip(runs, distinct_names(folders), strict=True):
            run.name = name
    return runs


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them all apart."""
    # The last part alone is rarely enough: `a/run` and `b/run`. All parts always are.
    most = max(len(folder.parts) for folder in folders)
    names: list[str] = []
    for count in range(1, most + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
