"""Lines of JSON for steps: those of a user's function and those of rows, continued where they
ended."""

import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castalia.core.errors import ConfigError, DataError
from castalia.core.files import cannot_write
from castalia.core.functions import named_function, source_hash
from castalia.stream.batches import RECORD, OnSteps, Written, identity, job
from castalia.stream.opening import StepRows, Stream
from castalia.stream.processes import in_processes

OPTION = "--fn"
EXAMPLE = "mystatistics:of_batch"
CHUNK = 1 << 16
"""Bytes read at a time from the end of a file."""


def custom_batches(
    stream: Stream,
    steps: range,
    function: str,
    path: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    on_steps: OnSteps = lambda count: None,
) -> Written:
    """Call function(batch, step) for each step and write what it returns, a line of JSON a step.

    batch is int64, (rows, tokens + 1); a function of three parameters also gets the step's `Block`,
    with the sources and documents of the rows. The file appears when it has all steps; until then
    PATH.partial holds those that are done, and the same command goes on behind them.
    Raises  ConfigError if the function cannot be imported, fails or returns no dict, with the step.
    """
    facts = {
        "mode": "custom",
        "function": function,
        "source": source_hash(user_function(function), function),
        "first": steps.start,
        **identity(stream),
    }
    with LineFile(path, facts, steps.stop, overwrite) as file:
        first = steps.start
        if file.last is not None:
            first = int(file.last["step"]) + 1
        missing = range(first, steps.stop)
        on_steps(first - steps.start)
        rows = 0
        work = partial(call_group, function)
        for group in in_processes(stream, work, stream.groups(missing), workers):
            file.append(group.lines)
            rows += group.rows
            on_steps(len(group.lines))
            if group.error is not None:
                raise group.error
    return Written(len(missing), first - steps.start, rows)


def called_lines(stream: Stream, steps: range, function: str, workers: int = 0) -> Iterator[str]:
    """The lines that `custom_batches` writes.

    Raises  as `custom_batches`.
    """
    user_function(function)
    for group in in_processes(stream, partial(call_group, function), stream.groups(steps), workers):
        yield from group.lines
        if group.error is not None:
            raise group.error


class Called(NamedTuple):
    """What a function returned for some steps, up to the first that failed."""

    lines: list[str]
    rows: int
    error: ConfigError | None = None


def call_group(name: str, stream: Stream, steps: range) -> Called:
    """The lines of some steps."""
    function = user_function(name)
    with_block = takes_block(function)
    lines: list[str] = []
    count = 0
    for rows in stream.batches(steps):
        try:
            record = {"step": rows.step, **called(function, name, rows, with_block)}
            lines.append(as_line(record, f"{OPTION} {name}, step {rows.step}"))
        except ConfigError as error:
            # As a result: what was done before it is kept.
            return Called(lines, count, error)
        count += len(rows.block.places)
    return Called(lines, count)


def user_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises  ConfigError saying which part could not be imported.
    """
    return named_function(name, OPTION, EXAMPLE)


def takes_block(function: Callable[..., Any]) -> bool:
    """Whether a function has a third parameter."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of another language
        return False
    by_place = [one for one in parameters if one.kind <= one.POSITIONAL_OR_KEYWORD]
    return len(by_place) > 2


def called(
    function: Callable[..., Any], name: str, rows: StepRows, with_block: bool
) -> dict[str, Any]:
    """What the function returns for a step, without a `step` of its own.

    Raises  ConfigError with the step, if it fails or returns no dict.
    """
    seen = rows.seen
    arguments: list[Any] = [seen.tokens, rows.step]
    if with_block:
        arguments.append(seen)
    try:
        result = function(*arguments)
    except Exception as error:
        # The last frame of the traceback is where the user's code stopped.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        raise ConfigError(
            f"{OPTION} {name}, step {rows.step}: {type(error).__name__}: {error} ({where})"
        ) from error
    if not isinstance(result, dict):
        raise ConfigError(
            f"{OPTION} {name}, step {rows.step}: returned {type(result).__name__}, expected a dict"
            " of what JSON can hold"
        )
    return {key: value for key, value in result.items() if key != "step"}


def as_line(record: dict[str, Any], where: str) -> str:
    """A record as a line of JSON.

    Raises  ConfigError naming what JSON cannot hold.
    """
    try:
        return json.dumps(plain(record), ensure_ascii=False)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def plain(value: Any) -> Any:
    """A value of numbers, texts, lists and dicts; numpy's become Python's, and nan and infinity,
    which JSON lacks, None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        # JSON has no NaN.
        if math.isfinite(value):
            return value
        return None
    if isinstance(value, dict):
        return {str(plain(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):  # a tensor
        return plain(value.tolist())
    raise TypeError(f"JSON cannot hold {type(value).__name__} {value!r:.40}")


class LineFile:
    """Lines of JSON, appended to PATH.partial, which becomes PATH at the end.

    `last` is the last whole record that an earlier job of the same facts left, None without one.
    Raises  ConfigError as `castalia.stream.batches.job`, or if there are records of steps from
            `stop` on; CastaliaError if it cannot be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any], stop: int, overwrite: bool) -> None:
        self.path = path
        self.stop = stop
        self.partial = path.with_name(f"{path.name}.partial")
        record = path.with_name(f"{path.name}{RECORD}")
        self.job = job(record, facts, self.files, overwrite)
        self.last: dict[str, Any] | None = None

    def files(self) -> Iterator[Path]:
        """The files that there are."""
        return (path for path in (self.path, self.partial) if path.exists())

    def __enter__(self) -> "LineFile":
        self.job.__enter__()
        try:
            return self.open()
        except BaseException:
            self.job.__exit__(*sys.exc_info())
            raise

    def open(self) -> "LineFile":
        """Go on behind the last whole line."""
        try:
            finished = self.path.exists() and not self.partial.exists()
            self.file = open(self.path if finished else self.partial, "ab+")  # noqa: SIM115
            end = self.last_line()
            self.require_no_more()
            self.file.truncate(end)
            if finished:
                # A longer range goes on behind the shorter one that was finished.
                os.replace(self.path, self.partial)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return self

    def require_no_more(self) -> None:
        """Raises  ConfigError if there are records of later steps than those asked for."""
        if self.last is None or int(self.last["step"]) < self.stop:
            return
        raise ConfigError(
            f"{self.file.name} has steps up to {self.last['step']}, and steps up to {self.stop - 1}"
            " are asked for; choose another --output, or replace it with --overwrite"
        )

    def last_line(self) -> int:
        """The end of the last whole line, which becomes `last`.

        Raises  DataError if it is no record.
        """
        size = self.file.seek(0, os.SEEK_END)
        tail = b""
        begin = size
        while begin and tail.count(b"\n") < 2:
            begin = max(0, begin - CHUNK)
            self.file.seek(begin)
            tail = self.file.read(size - begin)
        end = tail.rfind(b"\n") + 1
        line = tail[:end].rstrip(b"\n").rpartition(b"\n")[2]
        if line:
            try:
                self.last = json.loads(line)
            except ValueError:
                raise DataError(f"{self.file.name}: its last line is no JSON; delete it") from None
        return begin + end

    def append(self, lines: Iterable[str]) -> None:
        """Add lines; they are in the file when this returns.

        Raises  CastaliaError if the disk is full.
        """
        try:
            self.file.write("".join(f"{line}\n" for line in lines).encode())
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.partial, error) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                os.replace(self.partial, self.path)
        except OSError as failed:
            raise cannot_write(self.path, failed) from failed
        finally:
            self.job.__exit__(kind, error, trace)
