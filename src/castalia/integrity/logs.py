"""The append-only logs of a run, and the small files that describe it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from castalia.checkpoint import complete_steps
from castalia.checkpoint.load import read_state
from castalia.checkpoint.names import step_name
from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.core.log_lines import read_log, step_of
from castalia.integrity.kinds import CheckedFile, unlisted
from castalia.monitor.sinks.record import FOLDER as MONITORS
from castalia.monitor.sinks.record import record_fault
from castalia.results.store import FILE as RESULTS
from castalia.results.store import ResultsStore
from castalia.runs.folder import RECORD, recorded_faults

LOGS = ("metrics.jsonl", "events.jsonl", "samples/rollouts.jsonl")
MIXTURES = "mixture*.jsonl"
BY = "CRC-32 in each line"
BY_PAGES = "CRC-32 of its pages"


def check_files(path: Path) -> Iterator[CheckedFile]:
    """The files of a run beside its checkpoints: those in its folder, and the logs and the results
    table below it."""
    expected = expected_logs(path)
    faults = recorded_faults(path)
    logs = {path / name for name in LOGS} | set(path.glob(MIXTURES))
    logs |= {path / name for name in expected if "/" not in name}
    table = path / "evals" / RESULTS
    records = set((path / MONITORS).glob("*.json"))
    inside = {file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")}
    for file in sorted(inside | {log for log in logs if is_due(log, expected)} | {table} | records):
        if file in logs:
            yield checked_log(file, expected.get(file.name, {}).get("step"))
        elif file.name in faults and file.parent == path:
            fault = faults[file.name]
            yield CheckedFile(str(file), fault, f"SHA-256 in {RECORD}", size_of(file))
        elif file in records:
            yield CheckedFile(str(file), record_fault(file), "SHA-256 of its values", size_of(file))
        elif file == table:
            if table.is_file():
                yield checked_table(table)
        else:
            yield unlisted(file)


def is_due(log: Path, expected: dict[str, Any]) -> bool:
    """Whether a log is there, or a checkpoint says that it was."""
    return log.is_file() or log.name in expected


def size_of(path: Path) -> int:
    """Bytes; 0 for a file that is gone."""
    if path.is_file():
        return path.stat().st_size
    return 0


def expected_logs(path: Path) -> dict[str, Any]:
    """What the newest good checkpoint says of the logs; empty for one of an older version."""
    folder = path / "checkpoints"
    for step in reversed(complete_steps(folder)):
        try:
            state = read_state(folder / step_name(step))
        except CastaliaError:
            continue
        logs: dict[str, Any] = state.get("logs", {})
        return logs
    return {}


def checked_log(path: Path, least: int | None) -> CheckedFile:
    """A log, by its own checksums and by the step that a checkpoint relies on."""
    if not path.is_file():
        return CheckedFile(
            str(path), f"{path} is missing; a checkpoint relies on its step {least}", BY
        )
    last = 0
    by = ""
    faults = []
    for line in read_log(path):
        if line.fault:
            faults.append(f"line {line.number}: {line.fault}")
        if line.is_covered:
            by = BY
        last = step_of(line.text) or last
    if least is not None and last < least:
        faults.append(f"it ends with step {last}, and a checkpoint relies on its step {least}")
    fault = None
    if faults:
        more = ""
        # Three faults show where to look; a truncated log may have thousands.
        if len(faults) > 3:
            more = f"; and {len(faults) - 3} more"
        fault = f"{path}: {'; '.join(faults[:3])}{more}"
    return CheckedFile(str(path), fault, by, size_of(path))


def checked_table(path: Path) -> CheckedFile:
    """The table of evaluations, whose pages have checksums."""
    try:
        ResultsStore(path).table()
    except DataError as error:
        return CheckedFile(str(path), str(error), BY_PAGES, size_of(path))
    except ConfigError:
        # Nothing here reads Parquet.
        return unlisted(path)
    return CheckedFile(str(path), None, BY_PAGES, size_of(path))
