"""The batches of steps as files that other programs read: whole or absent, and continued after an
interruption.

Source  utils/batch_viewer.py of EleutherAI/pythia (until commit 899add0): `save` and `custom`.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import atomic_write, claimed, read_json, write_json
from castalia.data.fingerprint import of_training
from castalia.monitor.sinks.jsonl import recorded_hashes
from castalia.stream.opening import Stream
from castalia.stream.processes import in_processes
from castalia.stream.viewing import step_hash

RECORD = "_batches.json"
"""Beside the files: which rows they hold. Readers of a folder of tables pass over such a name."""
OnSteps = Callable[[int], object]
"""Takes a number of steps that are done."""


class Written(NamedTuple):
    """What a job has written."""

    steps: int
    """Steps whose files or records it wrote."""
    skipped: int
    """Steps whose files or records were there."""
    rows: int
    """Rows that it read."""


def identity(stream: Stream) -> dict[str, Any]:
    """What decides the rows of a stream's steps, for a record beside them."""
    facts = of_training(stream.rows.fingerprint)
    facts["curriculum"] = stream.config.curriculum.model_dump(mode="json")
    if stream.is_mixed:
        # Its rows depend on its losses, and so on all of its config.
        facts["config"] = stream.config.model_dump(mode="json", exclude={"output"})
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {
        "rows": digest,
        "sources": stream.sources,
        "seq_length": stream.config.data.seq_length,
        "batch_size": stream.config.train.batch_size,
    }


@contextmanager
def job(
    path: Path, facts: dict[str, Any], files: Callable[[], Iterator[Path]], overwrite: bool
) -> Iterator[None]:
    """Claim a folder for the files of one job, whose facts stand in the record at `path` there.

    `files` finds the files of this or an earlier job, which `overwrite` deletes first.
    Raises  ConfigError if they are of another job, or another process works in the folder.
    """
    with claimed(path.parent, silent=1.0):
        if overwrite:
            for file in list(files()):
                file.unlink()
            path.unlink(missing_ok=True)
        there = next(files(), None)
        if path.exists():
            # A record without a file is of a job that ended before its first one: it binds nobody.
            differ = [key for key, value in read_json(path).items() if facts.get(key) != value]
            if differ and there is not None:
                raise ConfigError(
                    f"{there} belongs to another job ({', '.join(differ)}: see {path}); choose"
                    " another --output, or replace it with --overwrite"
                )
        elif there is not None:
            raise ConfigError(
                f"{there} is not of castalia batches, or lacks {path}; choose another --output, or"
                " replace it with --overwrite"
            )
        write_json(path, facts)
        yield


def tidy(folder: Path, strays: str) -> None:
    """Delete what a killed job left behind in a folder that this process has claimed."""
    for stray in folder.glob(strays):
        stray.unlink(missing_ok=True)


def save_batches(
    stream: Stream,
    steps: range,
    folder: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    on_steps: OnSteps = lambda count: None,
) -> Written:
    """Write batch{step}_bs{rows}.npy for each step: int64, (rows, tokens + 1), as Pythia's first
    viewer did.

    Each file appears when it is whole. Those that are there are kept, unless their size is wrong.
    Raises  ConfigError as `job`; CastaliaError if a file cannot be written.
    """
    facts = {"mode": "save", **identity(stream)}
    with job(folder / RECORD, facts, lambda: folder.glob("batch*_bs*.npy"), overwrite):
        tidy(folder, ".batch*.npy.*.tmp")
        missing = unsaved(stream, steps, folder)
        on_steps(len(steps) - len(missing))
        rows = 0
        work = partial(save_group, folder)
        for done in in_processes(stream, work, stream.groups(missing), workers):
            rows += sum(done)
            on_steps(len(done))
    return Written(len(missing), len(steps) - len(missing), rows)


def unsaved(stream: Stream, steps: range, folder: Path) -> list[int]:
    """The steps whose numpy file is not in a folder, or not of the size of their rows."""
    with os.scandir(folder) as entries:
        bytes_of = {entry.name: entry.stat().st_size for entry in entries}
    curriculum = stream.curriculum
    missing = []
    for step in steps:
        rows = stream.sizes.size(step)
        whole = numpy_bytes(rows, curriculum.length(step + 1) + 1)
        if bytes_of.get(numpy_name(step, rows)) != whole:
            missing.append(step)
    return missing


def numpy_name(step: int, rows: int) -> str:
    """The file of a step, as Pythia's first viewer named it."""
    return f"batch{step}_bs{rows}.npy"


@cache
def numpy_bytes(rows: int, columns: int) -> int:
    """Size of the file of an int64 array of this shape."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(np.int64))
    facts = {"descr": description, "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.tell() + 8 * rows * columns


def save_group(folder: Path, stream: Stream, steps: range) -> list[int]:
    """Write the files of some steps; returns the rows of each."""
    sizes = []
    for rows in stream.batches(steps):
        tokens = np.ascontiguousarray(rows.seen.tokens)
        path = folder / numpy_name(rows.step, len(tokens))
        # The rename keeps a kill from leaving half a file. To wait for the disk at each of some
        # hundred thousand files would take longer than to read them; what a power cut left short
        # is found by its size when the job goes on.
        with atomic_write(path, "wb", synced=False) as file:
            np.save(file, tokens)
        sizes.append(len(tokens))
    return sizes


def hash_group(stream: Stream, steps: range) -> list[tuple[int, int]]:
    """Each of some steps with its rows_hash."""
    return [(step, step_hash(stream.rows.train, step, stream.sizes)) for step in steps]


def verify_batches(
    stream: Stream, steps: range, *, workers: int = 0, on_steps: OnSteps = lambda count: None
) -> int:
    """Compare the rows of steps with the rows_hash that training wrote to metrics.jsonl.

    Returns  the number of steps that were compared.
    Raises   ConfigError without a run's folder; DataError naming the first step whose rows are
             others, or whose hash is not recorded.
    """
    if stream.folder is None:
        raise ConfigError(
            "--verify compares with the metrics.jsonl of a run; name the folder of one"
        )
    path = stream.folder / "metrics.jsonl"
    recorded = recorded_hashes(path, steps)
    for group in in_processes(stream, hash_group, stream.groups(steps), workers):
        for step, found in group:
            if step not in recorded:
                raise DataError(f"{path}: no rows_hash of step {step}; --verify needs one for each")
            if recorded[step] != found:
                raise DataError(
                    f"step {step}: the rows have the hash {found}, but the run trained on rows of"
                    f" {recorded[step]} ({path}, step {step + 1}); its data or its order changed"
                )
        on_steps(len(group))
    return len(steps)
