"""The numbers of a run's evaluations, for its card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castalia.results.schema import EVALS, is_installed
from castalia.results.store import FILE, ResultsStore, read_stores

COLUMNS_SHOWN = 6
"""Steps side by side in the table of main."""
CONDITIONS = ("task", "metric", "filter", "shots", "dtype", "engine", "harness")
"""What tells two lines of the table apart."""


@dataclass(frozen=True)
class Evaluations:
    """Numbers by condition and step."""

    numbers: dict[tuple[Any, ...], dict[int, dict[str, Any]]]
    """CONDITIONS -> step -> row of the results table."""
    note: str | None = None
    """Why there are none although a table exists."""

    def steps(self) -> list[int]:
        """Steps with a number, ascending."""
        return sorted({step for by_step in self.numbers.values() for step in by_step})

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """The rows of one step."""
        return [by_step[step] for by_step in self.numbers.values() if step in by_step]

    def table(self, steps: Sequence[int]) -> list[str]:
        """A Markdown table with a column for each step; without the lines that have no number."""
        shown = {
            key: by_step
            for key, by_step in self.numbers.items()
            if any(step in by_step for step in steps)
        }
        if not shown:
            return []
        head = ["task", "metric", "shots", "dtype", *(f"step {step:,}" for step in steps)]
        lines = [line_of(head), line_of(["---"] * len(head))]
        for (task, metric, kind, shots, dtype, *_), by_step in shown.items():
            name = metric
            if kind != "none":
                name = f"{metric} ({kind})"
            cells = [number_text(by_step.get(step)) for step in steps]
            lines.append(line_of([task, name, text_of(shots), text_of(dtype), *cells]))
        return lines


def line_of(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text_of(value: object) -> str:
    """A value, or nothing where it is unknown."""
    if value is None:
        return ""
    return str(value)


def number_text(row: dict[str, Any] | None) -> str:
    """A number with its standard error, where it has one."""
    if row is None:
        return ""
    number = f"{row['value']:.4g}"
    # Large perplexities come with infinite errors; a NaN is not equal to itself.
    error = row["stderr"]
    if error is not None and error == error:
        return f"{number} ± {error:.2g}"
    return number


def evaluations_of(run: Path) -> Evaluations:
    """The numbers in the tables of a run and of the folder around it.

    Raises  DataError if a table is damaged.
    """
    run = run.resolve()
    places = [run / EVALS, run.parent / EVALS]
    stores = [ResultsStore(place) for place in places if (place / FILE).is_file()]
    if not stores:
        return Evaluations({})
    if not is_installed():
        from castalia.core.extras import pip_command

        found = stores[0].path
        return Evaluations(
            {},
            f"the numbers of {found} are not on the card, since reading them needs duckdb and"
            f" pyarrow: {pip_command('results')}; the same command adds them later",
        )
    rows = [row for row in read_stores(stores).to_pylist() if is_of(row, run.name)]
    # By name, so that the card does not depend on the order of the evaluations.
    rows.sort(key=lambda row: tuple(text_of(row[name]) for name in CONDITIONS))
    numbers: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in CONDITIONS)
        numbers.setdefault(key, {})[row["step"]] = row
    return Evaluations(numbers)


def is_of(row: dict[str, Any], name: str) -> bool:
    """Whether a row is about a checkpoint of the run itself, and not of a variant of it."""
    return row["model"] == name and not row["variant"] and row["step"] is not None


def spread(steps: Sequence[int], count: int = COLUMNS_SHOWN) -> list[int]:
    """At most `count` of ascending steps, evenly, the last one included."""
    if len(steps) <= count:
        return list(steps)
    places = [round(at * (len(steps) - 1) / (count - 1)) for at in range(count)]
    return [steps[place] for place in places]
