"""Counts up to each checkpoint: the steps that are not counted yet are counted, then a look-up."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.checkpoint import complete_steps
from castalia.core.errors import ConfigError
from castalia.core.files import cache_folder, claimed
from castalia.stream.counting.asked import Asked, asked_hash
from castalia.stream.counting.ngram_parts import (
    part_stems,
    remove_part,
    tokens_of,
    top_of,
    words_by_hash,
)
from castalia.stream.counting.ngrams import Cutter, Ngrams, unpack
from castalia.stream.counting.parts import Store, missing_steps, range_of, steps_of_part
from castalia.stream.counting.running import CountJob, OnPart, count_parts
from castalia.stream.opening import Stream
from castalia.stream.same_data import training_hash


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
    ids: list[list[int]] | None = None
    """The ids of each label, of n-grams of tokens."""
    distinct: int | None = None
    """Different n-grams in all, of which the labels are the most frequent."""

    @property
    def found(self) -> int:
        """How many labels there are, also those that are not among `labels`."""
        if self.distinct is None:
            return len(self.labels)
        return self.distinct

    @property
    def totals(self) -> NDArray[np.int64]:
        """(K,) occurrences in all the steps."""
        return self.counts[:, -1]


@dataclass(frozen=True)
class Range:
    """The steps that are counted."""

    first: int
    stop: int
    checkpoints: list[int]
    """Checkpoints to report, ascending; the last is `stop`."""


def count(
    stream: Stream,
    asked: Asked,
    *,
    first: int = 0,
    stop: int | None = None,
    at: Sequence[int] | None = None,
    jobs: int = 1,
    on_part: OnPart | None = None,
) -> Counts:
    """Occurrences in the text that steps `first` to `stop` - 1 read, up to each checkpoint.

    A row's text is that of its T + 1 tokens as its step read them, cut where documents meet; what
    crosses such a border or the end of the row is not found, and a border ends a word. The last
    token of a row is also the first of the next row of its source, where both count it.
    `at` are checkpoints, by default those of the run.

    Steps that were counted before are looked up in RUN/counts; a kill loses the unfinished parts.
    Memory  a block of rows and the part's counts, a process.
    Raises  ConfigError for steps out of range or a stream without a tokenizer; DataError if the
            data have changed since the first count.
    """
    chosen = chosen_steps(stream, first, stop, at)
    with opened_store(stream, asked) as (store, job, size):
        missing = list(missing_steps(map(range_of, store.paths()), chosen.first, chosen.stop, size))
        count_parts(stream, job, missing, jobs, on_part)
        return look_up(store, asked, chosen)


def count_ngrams(
    stream: Stream,
    asked: Ngrams,
    *,
    top: int,
    first: int = 0,
    stop: int | None = None,
    at: Sequence[int] | None = None,
    jobs: int = 1,
    on_part: OnPart | None = None,
) -> Counts:
    """The `top` most frequent n-grams in what steps `first` to `stop` - 1 read, exactly.

    Parts are cut at the checkpoints that are reported, and count as a whole: one that a new
    checkpoint divides is counted again. Text, steps and errors as for `count`.
    Memory  the n-grams of a part, a process; MERGED_AT_ONCE keys of all parts in the merge.
    """
    asked.check()
    chosen = chosen_steps(stream, first, stop, at)
    bounds = sorted({chosen.first, *chosen.checkpoints})
    with opened_store(stream, asked) as (store, job, size):
        for stem in part_stems(store.folder):
            begin, end = range_of(stem)
            # Sorted n-grams do not tell their steps: a part counts as a whole or not at all.
            if any(begin < bound < end for bound in bounds):
                remove_part(stem)
        missing: list[tuple[int, int]] = []
        for low, high in pairwise(bounds):
            missing += missing_steps(map(range_of, part_stems(store.folder)), low, high, size)
        count_parts(stream, job, missing, jobs, on_part)
        stems = [
            stem
            for stem in part_stems(store.folder)
            if range_of(stem)[0] >= chosen.first and range_of(stem)[1] <= chosen.stop
        ]
        return most_frequent(job, stems, chosen, top)


def most_frequent(job: CountJob, stems: list[Path], chosen: Range, top: int) -> Counts:
    """The merge of parts, with the n-grams as text."""
    assert isinstance(job.asked, Ngrams)
    best = top_of(stems, chosen.checkpoints, top)
    cutter = Cutter(job.asked, job.tokenizer)
    numbers = []
    if len(best.keys):
        numbers = unpack(best.keys, job.asked.n, cutter.bits).tolist()
    ids = None
    if job.asked.words:
        words = words_by_hash(stems, {number for row in numbers for number in row})
        labels = [" ".join(words[number] for number in row) for row in numbers]
    else:
        ids = numbers
        labels = [job.tokenizer.decode(row) for row in numbers]
    tokens = sum(map(tokens_of, stems))
    return Counts(
        labels,
        best.counts,
        chosen.checkpoints,
        chosen.first,
        chosen.stop,
        tokens,
        ids,
        best.distinct,
    )


def chosen_steps(stream: Stream, first: int, stop: int | None, at: Sequence[int] | None) -> Range:
    """The steps to count and the checkpoints to report.

    Raises  ConfigError if they are not steps of the run, or not yet trained.
    """
    if stop is None:
        stop = stream.known
        if not stop:
            raise ConfigError(f"{stream.folder} has not trained a step yet: no row has been read")
    if first >= stop:
        raise ConfigError(
            f"--steps {first}:{stop}: no step; expected A < B, and the run has steps 0 to"
            f" {stream.steps - 1}"
        )
    stream.check_steps(first, stop)
    return Range(first, stop, checkpoints_of(stream, first, stop, at))


@contextmanager
def opened_store(stream: Stream, asked: Asked | Ngrams) -> Iterator[tuple[Store, CountJob, int]]:
    """The folder of a count, claimed; what its parts have in common; and the steps of a part.

    Raises  ConfigError without a tokenizer; DataError if the data have changed.
    """
    tokenizer = stream.tokenizer_for("counting")
    described = {**asked.described(), "tokenizer": tokenizer.sha256}
    if stream.config.curriculum.kind != "none":
        # It decides how much of its rows a step reads.
        described["curriculum"] = stream.config.curriculum.model_dump(mode="json")
    folder = counts_folder(stream) / asked_hash(described)
    store = Store(folder)
    with claimed(folder):
        width = stream.rows.train.seq_length + 1
        wished = steps_of_part(stream.sizes.rows, width, stream.steps)
        size = store.begin(described, stream.rows.fingerprint, wished)
        yield store, CountJob(asked, tokenizer, folder), size


def checkpoints_of(stream: Stream, first: int, stop: int, at: Sequence[int] | None) -> list[int]:
    """The checkpoints to report, ascending: `at`, or those of the run within the steps; and `stop`.

    Raises  ConfigError for one out of the range.
    """
    if at is None:
        saved = []
        if stream.folder is not None:
            saved = complete_steps(stream.folder / "checkpoints")
        return sorted({*(step for step in saved if first <= step <= stop), stop})
    for step in at:
        if not first <= step <= stop:
            raise ConfigError(f"--at {step}: not within the steps {first}:{stop} that are counted")
    return sorted({*at, stop})


def counts_folder(stream: Stream) -> Path:
    """Where counts are kept: in the run's folder, or in the cache for a config without one."""
    if stream.folder is not None:
        return stream.folder / "counts"
    return cache_folder() / "counts" / training_hash(stream.rows.fingerprint)


def look_up(store: Store, asked: Asked, chosen: Range) -> Counts:
    """Sum the parts up to each checkpoint."""
    numbers: dict[str, int] = {name: i for i, name in enumerate(asked.fixed)}
    found: list[tuple[list[int], NDArray[np.int64]]] = []
    tokens = 0
    for part in store.parts(chosen.first, chosen.stop):
        known = [numbers.setdefault(label, len(numbers)) for label in part.labels]
        before = part.before(chosen.first)
        found.append((known, np.stack([part.before(c) - before for c in chosen.checkpoints], 1)))
        tokens += part.tokens_in(chosen.first, chosen.stop)
    table = np.zeros((len(numbers), len(chosen.checkpoints)), np.int64)
    for known, counts in found:
        # A part has each label once.
        table[known] += counts
    return Counts(list(numbers), table, chosen.checkpoints, chosen.first, chosen.stop, tokens)


def default_jobs() -> int:
    """Processes that count at once: the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
