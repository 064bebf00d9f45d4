"""A scan: shards of rows, each computed by one process and written as a part, then one file.

Any number of processes may run the same scan, started together or one after the other: a process
claims a shard by a lock, which ends with the process, and writes the part under its last name only
when it is whole. So a killed scan continues, and no row is doubled or lost.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.core.extras import require
from castalia.core.files import claimed, locked, read_json, write_json
from castalia.core.workers import WorkerPool
from castalia.eval.labels import config_of_run, start_seed_in
from castalia.memorization.completion import Completions, Wanted, in_parallel, nothing
from castalia.memorization.engines import Readers, load_readers
from castalia.memorization.job import Job, Options, Shard, hash_of
from castalia.memorization.reader import Ids, Reader
from castalia.memorization.recall import memorization_score
from castalia.memorization.table import EXTRA, PURPOSE, Scores, schema, table_writer, write_part
from castalia.models import parameter_counts
from castalia.stream.opening import steps_of
from castalia.stream.same_data import training_hash

WAIT_SECONDS = 0.2
"""Between two looks at the shards that other processes compute."""
JOB = "job.json"
OF_MODEL = ("model_config", "parameters")
"""What the parts say of the model."""

Say = Callable[[str], None]


class Summary(NamedTuple):
    """A checkpoint of a finished scan."""

    step: int
    rows: int
    exact: int
    score: float | None
    """Mean."""
    loss: float | None
    """Mean, in nats."""
    near_ties: int
    """Rows with a choice that rounding may have decided."""


def scan(job: Job, processes: int = 1, say: Say = print) -> list[Summary]:
    """Compute what the output lacks, and write it; returns its checkpoints.

    processes   of this machine that share the work; others may have been started beside them.

    Raises  ConfigError if the output or its work folder hold other numbers than those asked for;
            DataError or CheckpointError if the data or the weights cannot be read.
    """
    folder = work_folder(job)
    earlier = finished_before(job)
    if earlier >= set(job.checkpoints):
        return summaries(job)
    # What is wrong with the rows or the steps is said before anything is written.
    left = [shard for shard in job.shards() if shard.checkpoint not in earlier]
    prepare(job, folder)
    if processes > 1 and left:
        work_together(job, left, processes)
    Worker(job, folder, say).work(left)
    assemble(job, folder)
    return summaries(job)


def work_folder(job: Job) -> Path:
    """Where the parts lie until the file is written."""
    return job.output.with_name(f".{job.output.name}.parts")


def finished_before(job: Job) -> set[Any]:
    """The checkpoints that the output already has.

    Raises  ConfigError if it holds other numbers.
    """
    if not job.output.exists():
        return set()
    scores = Scores(job.output)
    scores.close()
    require_same(job.identity(), scores.metadata["job"], job.output)
    had = {int(step): text for step, text in scores.metadata["weights"].items()}
    for checkpoint in job.checkpoints:
        if had.get(checkpoint.step, checkpoint.weights_hash) != checkpoint.weights_hash:
            raise ConfigError(
                f"{job.output} has step {checkpoint.step} of other weights than"
                f" {checkpoint.path} has now; delete it, or choose another --output"
            )
    return {checkpoint for checkpoint in job.checkpoints if checkpoint.step in had}


def require_same(now: dict[str, Any], before: dict[str, Any], place: Path) -> None:
    """Raises  ConfigError if a file or folder holds other numbers than those asked for."""
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        what = ", ".join(f"{name} {before.get(name)} (now {now[name]})" for name in changed)
        raise ConfigError(
            f"{place} was made with {what}; repeat those options, delete it, or choose another"
            " --output"
        )


def prepare(job: Job, folder: Path) -> None:
    """Begin the work folder, or check that it belongs to this scan.

    Raises  ConfigError if it is of another.
    """
    identity = job.identity()
    weights = {str(each.step): each.weights_hash for each in job.checkpoints}
    with claimed(folder):
        if not (folder / JOB).exists() or is_unused(folder):
            write_json(folder / JOB, {"job": identity, "weights": weights})
            return
    before = read_json(folder / JOB)
    require_same(identity, before["job"], folder)
    if weights != before["weights"]:
        raise ConfigError(
            f"{folder} holds an unfinished scan of steps {', '.join(before['weights'])}, or of"
            f" other weights of them; repeat those --steps, delete it, or choose another --output"
        )


def is_unused(folder: Path) -> bool:
    """Whether a work folder has no part and nobody computes one: its scan failed at the start."""
    if any(folder.glob("*.parquet")):
        return False
    for path in folder.glob("*.lock"):
        with open(path) as file:
            if not locked(file, shared=True):
                return False
    return True


def work_together(job: Job, shards: Sequence[Shard], processes: int) -> None:
    """Compute shards on several processes.

    Raises  CastaliaError if one of them dies; else what they raise.
    """
    threads = max(1, torch.get_num_threads() // processes)
    pool = WorkerPool(processes, torch.set_num_threads, threads)
    # A copy without the stream, which each process opens itself.
    futures = [pool.submit(work_alone, replace(job), shards) for _ in range(processes)]
    try:
        for future in futures:
            future.result()
    except BrokenProcessPool:
        raise CastaliaError(
            pool.why_none_began
            or "a worker process died, most likely for lack of memory; the same command with fewer"
            " --jobs continues"
        ) from None
    except BaseException:
        # A request to stop: finished shards are written, and nobody waits longer.
        pool.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def work_alone(job: Job, shards: Sequence[Shard]) -> None:
    """In a worker process."""
    Worker(job, work_folder(job), partial(print, file=sys.stderr)).work(shards)


class Worker:
    """One process of a scan."""

    def __init__(self, job: Job, folder: Path, say: Say) -> None:
        self.job = job
        self.folder = folder
        self.say = say
        self.path = ""
        self.readers: Readers | None = None

    def work(self, shards: Sequence[Shard]) -> None:
        """Compute shards that nobody else computes until all are there."""
        waiting = list(shards)
        while waiting:
            count = len(waiting)
            waiting = [shard for shard in waiting if not self.done(shard)]
            if len(waiting) == count:
                # Others compute what is left; if one of them dies, its lock ends.
                time.sleep(WAIT_SECONDS)

    def done(self, shard: Shard) -> bool:
        """Whether the part is there, after computing it if it is free."""
        part = part_of(self.job, shard)
        if part.exists():
            return True
        if not self.folder.exists() and shard.checkpoint in finished_before(self.job):
            # Another process has written the file, and removed the parts.
            return True
        with lock_of(part) as free:
            if not free:
                return False
            if not part.exists() and shard.checkpoint not in finished_before(self.job):
                self.compute(shard, part)
            return True

    def compute(self, shard: Shard, part: Path) -> None:
        """Score the rows of a shard and write its part."""
        start = time.monotonic()
        readers = self.readers_at(shard.checkpoint.path)
        windows, places = self.windows(shard, readers.model.config.vocab_size)
        done = completed(readers.readers, windows, self.job.options)
        options = self.job.options
        _, row = steps_of(self.job.stream.sizes, places)
        score = None
        if options.score:
            score = memorization_score(done.made, windows[:, options.prompt :])
        count = len(windows)
        columns = {
            "step": np.full(count, shard.checkpoint.step),
            "row": row,
            "index": places,
            "prompt": np.full(count, options.prompt),
            "continuation": np.full(count, options.continuation),
            "score": score,
            "exact": done.exact,
            "loss": done.losses,
        }
        write_part(part, columns, facts_of_part(done, readers))
        short = len(shard.places) - count
        rate = count / max(time.monotonic() - start, 1e-9)
        self.say(
            f"step {shard.checkpoint.step}: rows {shard.places[0]:,} to {shard.places[-1]:,},"
            f" {int(done.exact.sum()):,} of {count:,} exact, {rate:,.0f} rows/s"
            + (f", {short:,} are shorter than a window" if short else "")
        )

    def readers_at(self, path: str) -> Readers:
        """The readers of a checkpoint; the newest stay in memory."""
        if self.readers is None or self.path != path:
            self.readers = None  # its memory first
            options = self.job.options
            readers = load_readers(path, options.engine, options.dtype, options.device)
            limit = readers.model.config.max_position_embeddings
            if limit < options.window:
                raise ConfigError(
                    f"windows have {options.window} tokens, and {path} reads {limit}; choose a"
                    " smaller --prompt or --continuation"
                )
            self.readers = readers
            self.path = path
        return self.readers

    def windows(self, shard: Shard, size: int) -> tuple[Ids, Ids]:
        """The first tokens of the rows of a shard, (R, window), all below `size`, and their places,
        (R,). A row of which its step read fewer tokens is left out: the rest would be padding.

        Raises  DataError for ids that the model does not know.
        """
        length = self.job.options.window
        parts = [np.empty((0, length), np.int64)]
        places = [np.empty(0, np.int64)]
        for neighbours in runs_of(shard.places):
            for block in self.job.stream.blocks_read(neighbours):
                whole = np.flatnonzero(block.filled >= length)
                if not len(whole):
                    continue  # a curriculum's rows may be narrower than a window
                parts.append(block.tokens[whole, :length].astype(np.int64, copy=False))
                places.append(np.asarray(block.places, np.int64)[whole])
        windows = np.concatenate(parts)
        if len(windows) and windows.max() >= size:
            raise DataError(
                f"the rows have id {windows.max()}, and {shard.checkpoint.path} knows {size}: the"
                " stream is of another tokenizer"
            )
        return windows, np.concatenate(places)


def completed(readers: Sequence[Reader], windows: Ids, options: Options) -> Completions:
    """The completions of windows (R, prompt + N); equal ones are computed once."""
    wanted = Wanted(options.prompt, options.score, options.loss)
    if not len(windows):
        return nothing(wanted, windows.shape[1] - options.prompt)
    unique, places = np.unique(windows, axis=0, return_inverse=True)
    return in_parallel(readers, unique, wanted).at(places.reshape(-1))


def runs_of(places: "range | NDArray[np.int64]") -> Iterator[range]:
    """Ascending places as ranges of neighbours."""
    if isinstance(places, range):
        yield places
        return
    for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
        yield range(int(run[0]), int(run[-1]) + 1)


def part_of(job: Job, shard: Shard) -> Path:
    """The file of a shard."""
    name = f"step-{shard.checkpoint.step:08d}.{shard.number:05d}.{job.mark}.parquet"
    return work_folder(job) / name


@contextmanager
def lock_of(part: Path) -> Iterator[bool]:
    """Claim a part; yields whether nobody else has it. The claim ends with the process."""
    # Another process may have removed the folder a moment ago.
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part.with_suffix(".lock"), "w") as file:
        yield locked(file)


def assemble(job: Job, folder: Path) -> None:
    """Write the output out of the parts and of what it had, once, and remove the parts."""
    with claimed(folder):
        if not finished_before(job) >= set(job.checkpoints):
            write_whole(job)
    shutil.rmtree(folder, ignore_errors=True)


def write_whole(job: Job) -> None:
    """Write the output."""
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    earlier = Scores(job.output) if job.output.exists() else None
    had: dict[str, Any] = {"weights": {}, "near_ties": {}, "arithmetic": []}
    if earlier is not None:
        had = earlier.metadata
    weights = dict(had["weights"])
    near = dict(had["near_ties"])
    parts: dict[int, list[Path]] = {}
    for shard in job.shards():
        if str(shard.checkpoint.step) not in weights:
            parts.setdefault(shard.checkpoint.step, []).append(part_of(job, shard))
    for checkpoint in job.checkpoints:
        weights.setdefault(str(checkpoint.step), checkpoint.weights_hash)
        near.setdefault(str(checkpoint.step), 0)
    ways = set(had["arithmetic"])
    # Of the model, which the job does not know before it is loaded; a scan without rows never does.
    model = {name: had.get(name) for name in OF_MODEL}
    for step, paths in parts.items():
        said = [Scores(path).metadata for path in paths]
        model = {name: said[-1][name] for name in OF_MODEL}
        near[str(step)] = sum(part["near_ties"] for part in said)
        ways |= {part["arithmetic"] for part in said}
    metadata = facts(job) | model | {"job": job.identity(), "weights": weights, "near_ties": near}
    metadata["arithmetic"] = sorted(ways)
    fields = schema(metadata)
    with table_writer(job.output, fields) as writer:
        for step in sorted(map(int, weights)):
            if step in parts:
                for path in parts[step]:
                    writer.write_table(parquet.read_table(path).cast(fields))
            elif earlier is not None:
                for group in earlier.groups(step):
                    writer.write_table(group.cast(fields))


def facts_of_part(done: Completions, readers: Readers) -> dict[str, Any]:
    """What a part says beside its rows."""
    config = readers.model.config
    return {
        "near_ties": int(done.near.sum()),
        "arithmetic": readers.arithmetic,
        "model_config": config.model_dump(mode="json"),
        "parameters": parameter_counts(config).total,
    }


def facts(job: Job) -> dict[str, Any]:
    """What a reader of the file may ask: the run, config, data and seed of the rows; name and seed
    of the model."""
    config = job.stream.config
    return {
        "run": job.stream_name,
        "model": job.name,
        "config_hash": hash_of(config.model_dump(mode="json")),
        "fingerprint": training_hash(job.stream.rows.fingerprint),
        "weight_seed": None if job.run is None else start_seed_in(config_of_run(job.run)),
        "data_seed": config.order_seed,
        "rows_per_step": config.train.batch_size,
    }


def summaries(job: Job) -> list[Summary]:
    """The checkpoints of the output that were asked for."""
    scores = Scores(job.output)
    near = scores.metadata["near_ties"]
    result = []
    for checkpoint in job.checkpoints:
        rows = exact = 0
        sums: dict[str, float] = {}
        for table in scores.groups(checkpoint.step):
            rows += table.num_rows
            exact += int(table["exact"].to_numpy().sum())
            for name in ("score", "loss"):
                if table[name].null_count == 0:
                    sums[name] = sums.get(name, 0.0) + float(table[name].to_numpy().sum(dtype="f8"))
        means = {name: value / rows for name, value in sums.items()}
        ties = int(near.get(str(checkpoint.step), 0))
        result.append(
            Summary(checkpoint.step, rows, exact, means.get("score"), means.get("loss"), ties)
        )
    scores.close()
    return result
