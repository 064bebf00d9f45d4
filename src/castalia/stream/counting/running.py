"""Counting parts of a stream, in this process or in several; each part is written when whole."""

from collections.abc import Callable
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.workers import WorkerPool
from castalia.runs.config import RunConfig
from castalia.stream.counting.asked import Asked
from castalia.stream.counting.matches import SlowRowError
from castalia.stream.counting.ngram_parts import MERGED_AT_ONCE, save_part, save_words
from castalia.stream.counting.ngrams import Cutter, Keys, Ngrams, added_up
from castalia.stream.counting.parts import StepCounts, Store
from castalia.stream.counting.pieces import PieceTexts
from castalia.stream.opening import Stream, stream_of
from castalia.tokenizers.tokenizer import Tokenizer

OnPart = Callable[[int, int], object]
"""Hears the steps and the tokens of each part."""


@dataclass(frozen=True)
class CountJob:
    """What the parts of a count have in common."""

    asked: Asked | Ngrams
    tokenizer: Tokenizer
    folder: Path

    def counter(self, stream: Stream) -> Callable[[int, int], int]:
        """What counts a part, from its first step to one past its last, and returns its tokens."""
        if isinstance(self.asked, Ngrams):
            return NgramCounter(stream, self.asked, self.tokenizer, self.folder)
        return PartCounter(stream, self.asked, self.tokenizer, self.folder)


class PartCounter:
    """Counts what is asked in ranges of steps of a stream."""

    def __init__(self, stream: Stream, asked: Asked, tokenizer: Tokenizer, folder: Path) -> None:
        self.stream = stream
        self.store = Store(folder)
        self.texts = PieceTexts(tokenizer, asked.lower_text)
        self.find = asked.finder(tokenizer)

    def __call__(self, first: int, stop: int) -> int:
        """Count steps `first` to `stop` - 1 and write their part; returns its tokens."""
        counts = StepCounts(first)
        tokens = 0
        for block in self.stream.blocks_read(self.stream.places(first, stop)):
            pieces = self.texts(block)
            places = [self.stream.step_of(place) for place in block.places]
            try:
                found = self.find(pieces)
            except SlowRowError as slow:
                raise self.too_slow(*places[slow.row]) from None
            counts.add(found, np.array([step for step, _ in places], np.int64), pieces)
            tokens += pieces.tokens
        self.store.save(first, stop, counts)
        return tokens

    def too_slow(self, step: int, row: int) -> ConfigError:
        """The error of a pattern that does not come to an end."""
        return ConfigError(
            f"--regex: row {row} of step {step} took longer than the limit of --row-seconds; a"
            " pattern with nested repeats, such as (a+)+b, tries every way to cut a text"
        )


class NgramCounter:
    """Counts n-grams in ranges of steps of a stream."""

    def __init__(self, stream: Stream, asked: Ngrams, tokenizer: Tokenizer, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        self.texts = PieceTexts(tokenizer, asked.lower_text)
        self.cut = Cutter(asked, tokenizer)

    def __call__(self, first: int, stop: int) -> int:
        """Count steps `first` to `stop` - 1 and write their part; returns its tokens."""
        self.cut.new_part()
        gathered = []
        tokens = 0
        size = 0
        for block in self.stream.blocks_read(self.stream.places(first, stop)):
            pieces = self.texts(block)
            gathered.append(added_up(self.cut(pieces)))
            tokens += pieces.tokens
            size += len(gathered[-1][0])
            if size > MERGED_AT_ONCE:
                gathered = [joined_counts(gathered)]
                size = 0
        keys, counts = joined_counts(gathered)
        stem = self.folder / f"steps-{first:09}-{stop:09}"
        if self.cut.by_words:
            save_words(stem, self.cut.names)
        save_part(stem, keys, counts, {"tokens": tokens})
        return tokens


def joined_counts(parts: list[tuple[Keys, NDArray[np.int64]]]) -> tuple[Keys, NDArray[np.int64]]:
    """Several sorted lists of keys with counts as one."""
    keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return added_up(keys, counts)


LEAST_TOKENS = 5_000_000
"""Tokens for each process: a new one reads as many while it imports what it needs."""
WORKER: dict[str, Callable[[int, int], int]] = {}
"""The counter of this worker process."""


def begin_worker(state: tuple[RunConfig, CountJob]) -> None:
    """In a worker: open the stream."""
    config, job = state
    WORKER["counter"] = job.counter(stream_of(config, silent))


def silent(text: str) -> None:
    """Say nothing: the parent has said it."""


def count_in_worker(first: int, stop: int) -> int:
    """In a worker: count a part."""
    return WORKER["counter"](first, stop)


def count_parts(
    stream: Stream, job: CountJob, missing: list[tuple[int, int]], jobs: int, on_part: OnPart | None
) -> None:
    """Count the missing parts, in this process or in `jobs` of them.

    Raises  CastaliaError if a worker dies; the finished parts stay.
    """
    tell = on_part or (lambda steps, tokens: None)
    steps = sum(stop - first for first, stop in missing)
    tokens = steps * stream.config.tokens_per_step
    # A process more is worth its imports only if it counts for longer than they take.
    jobs = min(jobs, len(missing), tokens // LEAST_TOKENS)
    if jobs <= 1:
        # Also without a part: what cannot be counted is an error, counted before or not.
        counter = job.counter(stream)
        for first, stop in missing:
            tell(stop - first, counter(first, stop))
        return
    with WorkerPool(jobs, begin_worker, (stream.config, job)) as pool:
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
