"""The study: every analysis of some scans, in one pass over the rows, as tables of numbers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.memorization.analyses.density import (
    Counts,
    Density,
    counts_in_windows,
    window_of,
)
from castalia.memorization.analyses.doses import (
    DOSES,
    Doses,
    dose_lines,
    require_same_stream,
)
from castalia.memorization.analyses.files import ScanFile
from castalia.memorization.analyses.intervals import binomial_interval, mean_interval
from castalia.memorization.analyses.pairs import Pair, correlations, pairs_of, predictions
from castalia.memorization.analyses.positions import Positions
from castalia.memorization.analyses.table import Part, Scan, ScoreTable
from castalia.stream.opening import Stream

Lines = list[dict[str, Any]]
"""A table: columns to values, a line each."""
SEEN = "rows seen so far"
COMMON = "rows seen by all"


class Study(NamedTuple):
    """What the scores say."""

    scans: list[Scan]
    common: int
    """Rows that every scan has."""
    scored: bool
    """Whether partial scores are known; else a score is 1 for a memorized row and 0 for another."""
    tables: dict[str, Lines]
    notes: list[str]
    """What is missing, and why."""

    def data(self) -> dict[str, Any]:
        """The study as JSON values."""
        files = {scan.file.name: scan.file for scan in self.scans}
        return {
            "files": [
                {
                    "name": file.name,
                    "file": str(file.path),
                    "parameters": file.size,
                    "weight_seed": file.weight_seed,
                    "fingerprint": file.fingerprint,
                    "prompt": file.prompt,
                    "continuation": file.continuation,
                    "checkpoints": file.steps,
                }
                for file in files.values()
            ],
            "rows_seen_by_all": self.common,
            "partial_scores": self.scored,
            **self.tables,
            "notes": self.notes,
        }


class Sums:
    """What the pass over the rows adds up."""

    def __init__(self, table: ScoreTable, doses: Doses | None = None) -> None:
        levels = table.memorized
        self.doses = doses
        self.by_dose = np.zeros((len(table.scans), DOSES, levels), np.int64)
        self.levels = levels
        self.seen = np.zeros((len(table.scans), levels), np.int64)
        self.common = np.zeros((len(table.scans), levels), np.int64)
        self.joints: dict[Pair, Counts] = {
            pair: np.zeros((levels + 1, levels + 1), np.int64) for pair in pairs_of(table.scans)
        }
        self.positions = [Positions(table.places, table.pieces) for _ in table.scans]
        windows = [window_of(scan.rows) for scan in table.scans]
        self.densities = [Density(window, np.zeros(window + 1, np.int64)) for window in windows]

    def add(self, part: Part) -> None:
        """Add consecutive places."""
        levels = self.levels
        # Shares compare models only over the rows that each of them has seen.
        complete = np.ones(len(part.columns[0]), bool)
        for codes in part.columns:
            complete &= codes > 0
        for number, codes in enumerate(part.columns):
            # Code 0, a missing row, is no level.
            self.seen[number] += np.bincount(codes, minlength=levels + 1)[1:]
            self.common[number] += np.bincount(codes[complete], minlength=levels + 1)[1:]
            self.positions[number].add(part.first, codes)
            density = self.densities[number]
            density.counts[:] += counts_in_windows(codes, levels, density.window)
        if self.doses is not None:
            self.add_doses(part, self.doses)
        for (one, other), counts in self.joints.items():
            cells = part.columns[one].astype(np.intp) * (levels + 1) + part.columns[other]
            counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)

    def add_doses(self, part: Part, doses: Doses) -> None:
        """Add consecutive places by the dose of their rows."""
        dose = doses.at(part.first, len(part.columns[0]))
        for number, codes in enumerate(part.columns):
            inside = codes > 0
            cells = dose[inside] * self.levels + (codes[inside] - 1)
            shape = self.by_dose[number].shape
            self.by_dose[number] += np.bincount(cells, minlength=np.prod(shape)).reshape(shape)


def study_of(files: Sequence[ScanFile], folder: str | Path, stream: Stream | None = None) -> Study:
    """Analyze scans. What does not fit in memory lies in a folder in `folder` meanwhile.

    stream  the rows that were scanned: with it, scores by how often the data repeat a text.

    Raises  DataError if a file has a row twice, or is no scan of the stream; CastaliaError if the
            disk is full.
    """
    doses = None
    if stream is not None:
        require_same_stream(stream, files[0])
        doses = Doses(stream, files[0].prompt + files[0].continuation)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scores-") as place:
        table = ScoreTable(files, Path(place))
        sums = Sums(table, doses)
        for part in table.parts():
            sums.add(part)
    scans = table.scans
    # Without the rows that one of the two lacks.
    joints = {pair: counts[1:, 1:] for pair, counts in sums.joints.items()}
    tables = {
        "shares": shares(scans, sums),
        "predictions": predictions(scans, joints),
        "correlations": correlations(scans, joints),
        "positions": labelled(scans, [each.data() for each in sums.positions]),
        "slopes": slopes(scans, sums.positions),
        "densities": labelled(scans, [densities(each) for each in sums.densities]),
        "density_counts": labelled(scans, [density_counts(each) for each in sums.densities]),
        "density_quantiles": labelled(scans, [density_points(each) for each in sums.densities]),
        "doses": labelled(scans, [dose_lines(each) for each in sums.by_dose]),
        "levels": labelled(scans, [each.data() for each in table.losses]),
    }
    common = int(sums.common[0].sum())
    return Study(scans, common, table.scored, tables, notes_of(files, common, tables))


def labelled(scans: Sequence[Scan], tables: Sequence[Lines]) -> Lines:
    """One table of those of all scans, with the columns model and step before."""
    return [
        {"model": scan.file.name, "step": scan.step, **line}
        for scan, lines in zip(scans, tables, strict=True)
        for line in lines
    ]


def shares(scans: Sequence[Scan], sums: Sums) -> Lines:
    """Number and share of memorized rows, and the mean score, by scan and set of rows."""
    made: Lines = []
    for name, counts in ((SEEN, sums.seen), (COMMON, sums.common)):
        lines = [[share(name, row)] if row.sum() else [] for row in counts]
        made += labelled(scans, lines)
    return made


def share(name: str, levels: Counts) -> dict[str, Any]:
    """One line of the shares from the rows at each score."""
    rows = int(levels.sum())
    hits = int(levels[-1])
    scores = np.arange(len(levels)) / (len(levels) - 1)
    total = float(levels @ scores)
    ends = binomial_interval(hits, rows) or (None, None)
    mean = mean_interval(rows, total, float(levels @ scores**2)) or (None, None)
    return {
        "selection": name,
        "rows": rows,
        "memorized": hits,
        "share": hits / rows,
        "share_low": ends[0],
        "share_high": ends[1],
        "mean_score": total / rows,
        "mean_low": mean[0],
        "mean_high": mean[1],
    }


def slopes(scans: Sequence[Scan], positions: Sequence[Positions]) -> Lines:
    """The regression of each scan."""
    made = []
    for each in positions:
        slope = each.slope()
        lines: Lines = []
        if slope is not None:
            lines = [
                {
                    "rows": slope.rows,
                    "slope_per_million": slope.per_million,
                    "slope_low": slope.interval[0],
                    "slope_high": slope.interval[1],
                    "change": slope.change,
                }
            ]
        made.append(lines)
    return labelled(scans, made)


def densities(density: Density) -> Lines:
    """The dispersion test of one scan; no line without a complete window."""
    if density.windows:
        return [density.data()]
    return []


def density_counts(density: Density) -> Lines:
    """Windows with 0, 1, … memorized rows, beside what Poisson expects of that rate."""
    if not density.windows:
        return []
    expected = density.expected()
    # Up to the last count that is there, or that a window in a hundred studies would have.
    last = int(np.flatnonzero(density.counts)[-1])
    last = max([last, *(count for count, number in enumerate(expected) if number > 0.01)])
    found = [*density.counts.tolist(), *[0] * last]
    expected += [0.0] * last
    return [
        {"memorized": count, "windows": found[count], "expected": expected[count]}
        for count in range(last + 1)
    ]


def density_points(density: Density) -> Lines:
    """The points of the Q-Q plot."""
    if not density.windows or density.rate == 0:
        return []
    return [
        {"poisson": theory, "memorized": found, "windows": windows}
        for theory, found, windows in density.quantiles()
    ]


def notes_of(files: Sequence[ScanFile], common: int, tables: dict[str, Lines]) -> list[str]:
    """Sentences about what these scans cannot show."""
    notes = []
    bare = [file.name for file in files if not file.scored]
    if bare:
        notes.append(
            f"Partial scores of {', '.join(bare)} were not scanned: a score is here 1 for a"
            " memorized row and 0 for another."
        )
    if len(files) == 1:
        notes.append("One model: nothing is said of small models against large ones.")
    sizeless = [file.name for file in files if file.size is None]
    if sizeless and len(files) > 1:
        notes.append(
            f"No number of parameters is known of {', '.join(sizeless)}: give names with a size,"
            " such as 70m=FILE, to compare small models with large ones."
        )
    single = [file.name for file in files if len(file.rows) == 1]
    if single:
        notes.append(f"One checkpoint of {', '.join(single)}: no early one predicts a late one.")
    if not common:
        notes.append("No row was seen by all checkpoints of all models.")
    empty = [
        f"{line['model']} at {line['step']}"
        for line in tables["shares"]
        if line["selection"] == SEEN and not line["memorized"]
    ]
    if empty:
        notes.append(
            f"No row is memorized by {', '.join(empty)}: recall, precision and the Poisson plots"
            " have nothing to show there."
        )
    return notes
