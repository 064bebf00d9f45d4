"""Files of scans: which model a file is about, and what it holds, checked before it is read."""

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import require
from castalia.eval.places import Series, Steps
from castalia.memorization.table import KEY

EXTRA = "results"
PURPOSE = "an analysis of memorization"
COLUMNS = ("step", "index", "prompt", "continuation", "score", "exact", "loss")
"""Of a scan's file; it has others too."""
SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([kmbt])(?![a-z0-9])", re.IGNORECASE)
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


class ScanFile(NamedTuple):
    """One model: scores of the rows that several of its checkpoints have seen."""

    path: Path
    name: str
    """In pictures and tables."""
    size: float | None
    """Parameters; None if neither the file nor the name says it."""
    weight_seed: int | None
    fingerprint: str
    """Of the data and their order; "" if the file does not say it."""
    prompt: int
    continuation: int
    scored: bool
    """Whether partial scores are known; else only whether a row is memorized."""
    places: int
    """Length of the order as far as it was scanned: the last place + 1."""
    rows: dict[int, int]
    """Scores by checkpoint, in order."""

    @property
    def steps(self) -> list[int]:
        """The checkpoints."""
        return list(self.rows)


def open_scans(words: Sequence[str], steps: str | None = None) -> list[ScanFile]:
    """The files, from the smallest model to the largest, each checked.

    words  FILE or NAME=FILE.
    steps  the checkpoints to keep, as `castalia eval --steps` takes them; None for all.

    Raises  ConfigError for a missing file or a name given twice; CheckpointError for a checkpoint
            that a file lacks; DataError if a file is damaged, is no scan, or is about other rows
            than the first one.
    """
    scans = [open_scan(word, steps) for word in words]
    scans.sort(key=lambda scan: (scan.size or 0.0, scan.weight_seed or 0, scan.name))
    named: dict[str, ScanFile] = {}
    for scan in scans:
        other = named.setdefault(scan.name, scan)
        if other is not scan:
            raise ConfigError(
                f"{other.path} and {scan.path} are both named {scan.name!r}; name one of them:"
                f" NAME={scan.path}"
            )
    for scan in scans[1:]:
        require_same_rows(scans[0], scan)
    return scans


def open_scan(word: str, steps: str | None = None) -> ScanFile:
    """One file, by FILE or NAME=FILE.

    Raises  as `open_scans`.
    """
    given, sign, rest = word.partition("=")
    path = Path(rest if sign else word)
    # A file may itself have "=" in its name.
    if not sign or Path(word).exists():
        given = ""
        path = Path(word)
    if not path.is_file():
        raise ConfigError(f"no file {path}; give files that `castalia memorize --output` wrote")
    metadata = metadata_of(path)
    name = given or str(metadata.get("model") or path.stem)
    contents = contents_of(path)
    rows = contents.rows
    if steps is not None:
        series = Series(str(path), str(path), {step: str(path) for step in rows})
        rows = {step: rows[step] for step in Steps.of(steps).chosen(series)}
    return ScanFile(
        path=path,
        name=name,
        size=size_of(metadata.get("parameters"), name, path),
        weight_seed=metadata.get("weight_seed"),
        fingerprint=str(metadata.get("fingerprint") or ""),
        prompt=contents.prompt,
        continuation=contents.continuation,
        scored=contents.scored,
        places=contents.places,
        rows=rows,
    )


def metadata_of(path: Path) -> dict[str, Any]:
    """What a scan says about itself.

    Raises  DataError if the file is damaged or lacks a column of a scan.
    """
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no Parquet file, or is damaged: {error}") from None
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise DataError(
            f"{path} is no scan of memorization: it lacks the columns {', '.join(missing)}; give"
            " files that `castalia memorize --output` wrote"
        )
    try:
        said: dict[str, Any] = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    except ValueError as error:
        raise DataError(f"{path}: its metadata are no JSON: {error}") from None
    job: dict[str, Any] = said.get("job", {})
    return {**job, **said}


CHECK = """
    SELECT step, count(*), count(index), min(index), max(index), min(prompt), max(prompt),
           min(continuation), max(continuation), count(score),
           count(*) FILTER (isnan(score) OR score < 0 OR score > 1
                            OR abs(score * continuation - round(score * continuation)) > 0.01
                            OR exact IS NULL)
    FROM read_parquet(?) GROUP BY step ORDER BY step
"""


class Contents(NamedTuple):
    """What stands in a file; the fields are those of `ScanFile`."""

    prompt: int
    continuation: int
    scored: bool
    places: int
    rows: dict[int, int]


def contents_of(path: Path) -> Contents:
    """The rows of a file, counted and checked.

    Raises  DataError as `open_scans`.
    """
    duckdb = require("duckdb", EXTRA, PURPOSE)
    try:
        with duckdb.connect() as connection:
            # DuckDB takes a path for a pattern, in which brackets and stars are signs.
            words = [glob.escape(str(path))]
            lines: list[tuple[Any, ...]] = connection.execute(CHECK, words).fetchall()
    except duckdb.Error as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not lines:
        raise DataError(f"{path} has no row; scan a checkpoint that has seen rows")
    # Least and greatest prompt and continuation of each checkpoint: all of them must be equal.
    lengths = {line[5:9] for line in lines}
    prompt, last_prompt, continuation, last_continuation = lines[0][5:9]
    if len(lengths) > 1 or prompt != last_prompt or continuation != last_continuation:
        raise DataError(f"{path} has rows of several lengths of prompt or continuation")
    scored = any(line[-2] for line in lines)
    for step, rows, placed, first, *_, scores, wrong in lines:
        if step is None or placed != rows or first < 0:
            raise DataError(f"{path}: step or index is missing or negative in some rows")
        # All scores or none, as `castalia memorize` computes them.
        wrong += rows - scores if scored else 0
        if wrong:
            raise DataError(
                f"{path}: {wrong:,} of {rows:,} scores of checkpoint {step} are not a number of"
                f" {continuation} tokens; delete the file and scan again"
            )
    places = max(line[4] for line in lines) + 1
    return Contents(prompt, continuation, scored, places, {line[0]: line[1] for line in lines})


def require_same_rows(one: ScanFile, other: ScanFile) -> None:
    """Raises  DataError if two files do not compare."""
    if one.fingerprint and other.fingerprint and one.fingerprint != other.fingerprint:
        raise DataError(
            f"{one.path} and {other.path} are about other data or another order of them"
            f" (fingerprints {one.fingerprint[:12]} and {other.fingerprint[:12]}), so that their"
            " rows do not compare; analyze them apart"
        )
    for what, first, second in (
        ("prompts", one.prompt, other.prompt),
        ("continuations", one.continuation, other.continuation),
    ):
        if first != second:
            raise DataError(
                f"{one.path} has {what} of {first} tokens and {other.path} of {second}; scan both"
                " with the same lengths"
            )


def size_of(parameters: float | None, name: str, path: Path) -> float | None:
    """Parameters: what the file says, else a size such as 70m in the name or the path."""
    if parameters:
        return float(parameters)
    for text in (name, path.stem, path.parent.name):
        match = SIZE.search(text)
        if match:
            return float(match[1]) * UNITS[match[2].lower()]
    return None
