"""The harness's results as rows: one number a row."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

NO_RESULTS = ("alias", "name", "sample_len", "sample_count", "samples")
"""Keys of a task's results that are no metrics."""


class Number(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    """The harness's filter of the answers; `none` without one."""
    shots: int | None
    """For a group whose tasks differ in it, what was asked for."""
    value: float
    stderr: float | None
    documents: int
    """Documents that the number is a mean of."""
    higher_is_better: bool | None
    task_version: str | None
    task_hash: str
    """SHA-256 of the task's resolved config, 16 digits."""
    seconds: float
    """Time of the task; a task of a group gets the group's time in proportion to its tokens."""


def numbers_of(
    results: Mapping[str, Any],
    hashes: Mapping[str, str],
    seconds: Mapping[str, float],
    shots: int | None = None,
) -> list[Number]:
    """Every number in the harness's results; `hashes` and `seconds` by task and group, `shots` as
    they were asked for."""
    numbers = []
    for task, values in results["results"].items():
        for metric, name, value, stderr in metrics_of(values):
            key = f"{metric},{name}"
            documents = values.get("sample_count", {}).get(key, values.get("sample_len", 0))
            version = results["versions"].get(task)
            numbers.append(
                Number(
                    task=task,
                    metric=metric,
                    filter=name,
                    shots=results["n-shot"].get(task, shots),
                    value=value,
                    stderr=stderr,
                    documents=int(documents),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    task_version=None if version in (None, "N/A") else str(version),
                    task_hash=hashes[task],
                    seconds=seconds[task],
                )
            )
    return numbers


def metrics_of(values: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, filter, value, stderr or None) of a task's results, `acc,none` and its like."""
    for key, value in values.items():
        if key in NO_RESULTS or "," not in key or not isinstance(value, int | float):
            continue
        metric, _, name = key.partition(",")
        if metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{name}")
        # "N/A" where the harness knows no error of a metric.
        if not isinstance(stderr, int | float):
            stderr = None
        yield metric, name, float(value), None if stderr is None else float(stderr)
