"""All scores as a table on disk: a column for each scan, a byte or two for each place."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import CastaliaError, DataError
from castalia.core.extras import require
from castalia.core.files import cannot_write
from castalia.memorization.analyses.files import EXTRA, PURPOSE, ScanFile
from castalia.memorization.analyses.losses import Losses
from castalia.monitor.display import size_text

BATCH = 1 << 20
"""Rows of a file that are in memory together."""
PART = 1 << 20
"""Places of all columns that are in memory together: a multiple of every window."""

Codes = NDArray[Any]
"""(R,) 0 where a scan lacks the row, else matching pieces + 1."""


class Scan(NamedTuple):
    """One checkpoint of one file."""

    file: ScanFile
    step: int

    @property
    def rows(self) -> int:
        """Rows with a score."""
        return self.file.rows[self.step]


class Part(NamedTuple):
    """Scores of consecutive places."""

    first: int
    columns: list[Codes]
    """In the order of the scans."""


class ScoreTable:
    """Scores by scan and place.

    The files may be in any order of rows: a score is put to its place. Then every analysis goes
    through the places once, and two scans need no join.
    """

    def __init__(self, files: Sequence[ScanFile], folder: Path) -> None:
        """Read the files into `folder`, which the caller removes.

        Raises  DataError if a file has a row twice; CastaliaError if the disk lacks room.
        """
        self.files = files
        self.scored = all(file.scored for file in files)
        # Without partial scores the continuation is one piece, which matches or does not.
        self.pieces = files[0].continuation if self.scored else 1
        """What a score is a share of: the tokens of the continuation, or all of it."""
        self.memorized = self.pieces + 1
        """The code of score 1."""
        self.places = max(file.places for file in files)
        self.scans = [Scan(file, step) for file in files for step in file.steps]
        self.losses = [Losses(self.memorized) for _ in self.scans]
        # A byte for each row and scan, unless a continuation has more than 254 tokens.
        dtype: Any = np.uint16
        if self.memorized < 256:
            dtype = np.uint8
        require_room(folder, self.places * len(self.scans) * np.dtype(dtype).itemsize)
        # Mapped, not in memory; a new file is sparse and reads as zeros.
        try:
            self.columns = [
                np.memmap(folder / f"{number}.codes", dtype, "w+", shape=(self.places,))
                for number in range(len(self.scans))
            ]
        except OSError as error:
            raise cannot_write(folder, error) from None
        for file in files:
            self.read(file)

    def read(self, file: ScanFile) -> None:
        """Put the scores of one file to their places."""
        parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
        numbers = {scan.step: n for n, scan in enumerate(self.scans) if scan.file is file}
        with parquet.ParquetFile(file.path) as source:
            score = "exact"
            if self.scored:
                score = "score"
            names = ["step", "index", score, "loss"]
            for batch in source.iter_batches(BATCH, columns=names):
                steps, index, score, loss = (
                    batch[name].to_numpy(zero_copy_only=False) for name in names
                )
                codes = np.rint(score * self.pieces).astype(np.int64) + 1
                for step in np.unique(steps).tolist():
                    if step not in numbers:
                        continue
                    own = steps == step
                    self.columns[numbers[step]][index[own]] = codes[own]
                    self.losses[numbers[step]].add(codes[own] - 1, loss[own])
        for step, number in numbers.items():
            filled = sum(np.count_nonzero(part) for part in stretches(self.columns[number]))
            doubled = file.rows[step] - filled
            if doubled:
                raise DataError(
                    f"{file.path}: checkpoint {step} has {doubled:,} rows twice (an equal index);"
                    " a scan has each row once"
                )

    def parts(self) -> Iterator[Part]:
        """All places, some at a time."""
        for first in range(0, self.places, PART):
            # Copied: what is computed from a part reads the disk once.
            yield Part(first, [np.array(column[first : first + PART]) for column in self.columns])


def require_room(folder: Path, needed: int) -> None:
    """Raises  CastaliaError if the disk of a folder lacks room for so many bytes.

    Asked before: a mapped file that finds no room ends the process without a word.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CastaliaError(
            f"{folder.parent}: the scores need {size_text(needed)} of disk during the analysis, and"
            f" {size_text(free)} are free; choose an --output on another disk, or fewer --steps"
        )


def stretches(column: Codes) -> Iterator[Codes]:
    """A column, some places at a time."""
    for first in range(0, len(column), PART):
        yield column[first : first + PART]
