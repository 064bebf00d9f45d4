"""Counting: the steps that are not counted yet, in this process or several, then a look-up."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.checkpoint import complete_steps
from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.files import cache_folder, claimed
from castalia.core.workers import WorkerPool
from castalia.runs.config import RunConfig
from castalia.stream.counting.asked import Terms, asked_hash
from castalia.stream.counting.parts import StepCounts, Store, steps_of_part
from castalia.stream.counting.pieces import PieceTexts
from castalia.stream.opening import Stream, stream_of
from castalia.tokenizers.tokenizer import Tokenizer

Asked = Terms


@dataclass(frozen=True)
class Counts:
    """Counts of K labels over a range of steps."""

    labels: list[str]
    counts: NDArray[np.int64]
    """(K, checkpoints) occurrences in the steps before each checkpoint, from `first` on."""
    checkpoints: list[int]
    """Ascending; the last is `stop`."""
    first: int
    stop: int
    tokens: int
    """Tokens of the text that was searched."""

    @property
    def totals(self) -> NDArray[np.int64]:
        """(K,) occurrences in all the steps."""
        return self.counts[:, -1]


class PartCounter:
    """Counts what is asked in ranges of steps of a stream."""

    def __init__(self, stream: Stream, asked: Asked, tokenizer: Tokenizer, folder: Path) -> None:
        self.stream = stream
        self.store = Store(folder)
        self.texts = PieceTexts(tokenizer, asked.ignore_case)
        self.find = asked.finder(tokenizer)

    def __call__(self, first: int, stop: int) -> int:
        """Count steps `first` to `stop` - 1 and write their part; returns its tokens."""
        counts = StepCounts(first)
        for block in self.stream.blocks(self.stream.places(first, stop)):
            pieces = self.texts(block)
            steps = np.array([self.stream.step_of(place)[0] for place in block.places], np.int64)
            counts.add(self.find(pieces), steps)
            counts.tokens += pieces.tokens
        self.store.save(first, stop, counts)
        return counts.tokens


def count(
    stream: Stream,
    asked: Asked,
    *,
    first: int = 0,
    stop: int | None = None,
    at: Sequence[int] | None = None,
    jobs: int = 1,
    on_part: Callable[[int, int], object] | None = None,
) -> Counts:
    """Occurrences in the text that steps `first` to `stop` - 1 read, up to each checkpoint.

    A row's text is that of its T + 1 tokens as its step read them, cut where documents meet; what
    crosses such a border or the end of the row is not found, and a border ends a word. The last
    token of a row is also the first of the next row of its source, where both count it.
    `at` are checkpoints, by default those of the run; `on_part` hears (steps, tokens) of each part.

    Steps that were counted before are looked up in RUN/counts; a kill loses the unfinished parts.
    Memory  a block of rows and the part's counts, a process.
    Raises  ConfigError for steps out of range or a stream without a tokenizer; DataError if the
            data have changed since the first count.
    """
    stop = last_step(stream) if stop is None else stop
    require_steps(stream, first, stop)
    checkpoints = checkpoints_of(stream, first, stop, at)
    tokenizer = stream.tokenizer
    if tokenizer is None:
        raise ConfigError("counting needs a tokenizer; set data.tokenizer=FILE")
    described = {**asked.described(), "tokenizer": tokenizer.sha256}
    folder = counts_folder(stream) / asked_hash(described)
    store = Store(folder)
    with claimed(folder):
        width = stream.rows.train.seq_length + 1
        wished = steps_of_part(stream.sizes.rows, width, stream.steps)
        size = store.begin(described, stream.rows.fingerprint, wished)
        missing = list(store.missing(first, stop, size))
        count_parts(stream, asked, tokenizer, folder, missing, jobs, on_part)
        return look_up(store, asked, first, stop, checkpoints)


def last_step(stream: Stream) -> int:
    """The steps that a run has finished; all of those of a config that has not begun."""
    return stream.steps if stream.folder is None else stream.trained


def require_steps(stream: Stream, first: int, stop: int) -> None:
    """Raises  ConfigError if these are not steps of the run, or not yet trained."""
    if not 0 <= first < stop <= stream.steps:
        raise ConfigError(
            f"--steps {first}:{stop}: the run has steps 0 to {stream.steps - 1}; expected A < B"
        )
    if stop > last_step(stream):
        raise ConfigError(
            f"--steps {first}:{stop}: step {stop - 1} is not trained yet; {stream.folder} has"
            f" finished {stream.trained} steps, 0 to {stream.trained - 1}"
        )


def checkpoints_of(stream: Stream, first: int, stop: int, at: Sequence[int] | None) -> list[int]:
    """The checkpoints to report, ascending: `at`, or those of the run within the steps; and `stop`.

    Raises  ConfigError for one out of the range.
    """
    if at is None:
        saved = [] if stream.folder is None else complete_steps(stream.folder / "checkpoints")
        return sorted({*(step for step in saved if first <= step <= stop), stop})
    for step in at:
        if not first <= step <= stop:
            raise ConfigError(f"--at {step}: not within the steps {first}:{stop} that are counted")
    return sorted({*at, stop})


def counts_folder(stream: Stream) -> Path:
    """Where counts are kept: in the run's folder, or in the cache for a config without one."""
    if stream.folder is not None:
        return stream.folder / "counts"
    return cache_folder() / "counts" / asked_hash(stream.rows.fingerprint)


WORKER: dict[str, PartCounter] = {}
"""The counter of this worker process."""


def begin_worker(state: tuple[RunConfig, Asked, Tokenizer, Path]) -> None:
    """In a worker: open the stream."""
    config, asked, tokenizer, folder = state
    WORKER["counter"] = PartCounter(stream_of(config, silent), asked, tokenizer, folder)


def silent(text: str) -> None:
    """Say nothing: the parent has said it."""


def count_in_worker(first: int, stop: int) -> int:
    """In a worker: count a part."""
    return WORKER["counter"](first, stop)


def count_parts(
    stream: Stream,
    asked: Asked,
    tokenizer: Tokenizer,
    folder: Path,
    missing: list[tuple[int, int]],
    jobs: int,
    on_part: Callable[[int, int], object] | None,
) -> None:
    """Count the missing parts, in this process or in `jobs` of them.

    Raises  CastaliaError if a worker dies; the finished parts stay.
    """
    tell = on_part or (lambda steps, tokens: None)
    jobs = min(jobs, len(missing))
    if jobs <= 1:
        # Also without a part: a term that cannot be counted is an error, counted before or not.
        counter = PartCounter(stream, asked, tokenizer, folder)
        for first, stop in missing:
            tell(stop - first, counter(first, stop))
        return
    state = (stream.config, asked, tokenizer, folder)
    with WorkerPool(jobs, begin_worker, state) as pool:
        try:
            futures = {pool.submit(count_in_worker, *part): part for part in missing}
            for future in as_completed(futures):
                first, stop = futures[future]
                tell(stop - first, future.result())
        except BrokenProcessPool:
            reason = pool.why_none_began or "a counting process died, most likely out of memory"
            raise CastaliaError(f"{reason}; run it again: the finished parts are kept") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def look_up(store: Store, asked: Asked, first: int, stop: int, checkpoints: list[int]) -> Counts:
    """Sum the parts up to each checkpoint."""
    numbers: dict[str, int] = {name: i for i, name in enumerate(asked.fixed or ())}
    rows: list[NDArray[np.int64]] = []
    places: list[NDArray[np.int64]] = []
    tokens = 0
    for part in store.parts(first, stop):
        known = [numbers.setdefault(label, len(numbers)) for label in part.labels]
        before = part.before(first)
        own = [part.before(min(step, stop)) - before for step in checkpoints]
        rows.append(np.stack(own, 1))
        places.append(np.array(known, np.int64))
        tokens += part.tokens
    table = np.zeros((len(numbers), len(checkpoints)), np.int64)
    for place, values in zip(places, rows, strict=True):
        # A part has each label once.
        table[place] += values
    return Counts(list(numbers), table, checkpoints, first, stop, tokens)


def default_jobs() -> int:
    """Processes that count at once: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def json_of(counts: Counts, order: Sequence[int]) -> dict[str, Any]:
    """The counts of some labels, by their numbers, as the verb prints them."""
    terms = []
    for number in order:
        values = counts.counts[number].tolist()
        by_checkpoint = {str(c): v for c, v in zip(counts.checkpoints, values, strict=True)}
        terms.append(
            {"term": counts.labels[number], "count": values[-1], "by_checkpoint": by_checkpoint}
        )
    return {"terms": terms, "tokens": counts.tokens, "steps": counts.stop - counts.first}
