"""The tables that `castalia eval` prints."""

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from castalia.eval.jobs import number_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from castalia.eval.sweeps import Outcome
    from castalia.results import Result

MOST_COLUMNS = 4
"""Checkpoints that stand side by side; more stand below each other."""
PIPE_WIDTH = 200
"""Columns where the output is no terminal."""
CELL = 16
"""Columns that a number with its error takes."""
Column = tuple[str, str, str, int | None]
"""Task, metric, filter and number of examples."""


def print_table(outcomes: "Sequence[Outcome]") -> None:
    """All numbers: the metrics below each other for a few checkpoints, side by side for many."""
    shown = [outcome for outcome in outcomes if outcome.rows]
    if not shown:
        return
    console = console_here()
    metrics = list(dict.fromkeys(column_of(row) for o in shown for row in o.rows))
    numbers = [{column_of(row): row for row in outcome.rows} for outcome in shown]
    titles = titles_of(shown)
    if len(shown) <= MOST_COLUMNS:
        table = new_table(["task", "metric", "shots"], titles)
        for metric in metrics:
            table.add_row(*words_of(metric), *(cell(row.get(metric)) for row in numbers))
        console.print(table)
        return
    # As many metrics beside each other as the terminal is wide; then the next ones.
    width = max(CELL, *(len(part) for each in metrics for part in heading(each).split("\n"))) + 2
    room = max(1, (console.width - max(map(len, titles))) // width)
    for start in range(0, len(metrics), room):
        part = metrics[start : start + room]
        table = new_table(["checkpoint"], [heading(metric) for metric in part])
        for title, row in zip(titles, numbers, strict=True):
            table.add_row(title, *(cell(row.get(metric)) for metric in part))
        console.print(table)


def titles_of(outcomes: "Sequence[Outcome]") -> list[str]:
    """Model and step of each; those that are alike with their engine and dtype."""
    titles = [outcome.checkpoint.title for outcome in outcomes]
    words = []
    for title, outcome in zip(titles, outcomes, strict=True):
        row = outcome.rows[0]
        alike = titles.count(title) > 1
        words.append(f"{title}, {row.engine} {row.dtype}" if alike else title)
    return words


def print_effects(outcomes: "Sequence[Outcome]") -> None:
    """What each arithmetic changes in each metric, against the reference; means of many."""
    kinds: dict[str, list[tuple[Result, Result]]] = {}
    for outcome in outcomes:
        for row, exact in paired(outcome):
            how = f"{row.engine} {row.dtype} against {exact.engine} {exact.dtype}"
            kinds.setdefault(how, []).append((row, exact))
    for how, pairs in kinds.items():
        console = console_here()
        console.print(f"\n{how}:")
        console.print(effects_table(pairs))


def effects_table(pairs: "Sequence[tuple[Result, Result]]") -> "Table":
    """The differences of one arithmetic."""
    if len({row.checkpoint for row, _ in pairs}) == 1:
        table = new_table(["task", "metric", "shots"], ["reference", "here", "difference"])
        for row, exact in pairs:
            difference = f"{row.value - exact.value:+.4g}"
            table.add_row(*words_of(column_of(row)), cell(exact), cell(row), difference)
        return table
    table = new_table(["task", "metric", "shots"], ["checkpoints", "mean", "largest"])
    for metric, differences in by_metric(pairs):
        largest = max(differences, key=abs)
        mean = f"{statistics.fmean(differences):+.4g}"
        table.add_row(*words_of(metric), str(len(differences)), mean, f"{largest:+.4g}")
    return table


def paired(outcome: "Outcome") -> "list[tuple[Result, Result]]":
    """Each number with the reference's."""
    exact = {column_of(row): row for row in outcome.reference}
    return [(row, exact[column_of(row)]) for row in outcome.rows if column_of(row) in exact]


def by_metric(pairs: "Iterable[tuple[Result, Result]]") -> list[tuple[Column, list[float]]]:
    """Differences from the reference over all checkpoints."""
    differences: dict[Column, list[float]] = {}
    for row, exact in pairs:
        differences.setdefault(column_of(row), []).append(row.value - exact.value)
    return list(differences.items())


def column_of(row: "Result") -> Column:
    """Which metric a row is."""
    return row.task, row.metric, row.filter, row.shots


def words_of(metric: Column) -> tuple[str, str, str]:
    """Task, metric and number of examples; a filter stands with its metric."""
    task, name, kind, shots = metric
    return task, name if kind == "none" else f"{name},{kind}", "" if shots is None else str(shots)


def heading(metric: Column) -> str:
    """A metric above its column."""
    task, name, shots = words_of(metric)
    return f"{task}\n{name}{f' {shots}-shot' if shots else ''}"


def cell(row: "Result | None") -> str:
    """A number with its error; a dash where there is none."""
    return "-" if row is None else number_text(row)


def new_table(left: Sequence[str], right: Sequence[str]) -> "Table":
    """A table with words on the left and numbers on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="italic")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def console_here() -> "Console":
    """Standard output; lines of a pipe stay lines."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
