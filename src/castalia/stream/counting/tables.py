"""Counts as JSON and as a table of text."""

from collections.abc import Sequence
from typing import Any

from castalia.stream.counting.counting import Counts

MOST_COLUMNS = 8
"""Checkpoints that the table shows; the JSON has all."""


def most_first(counts: Counts) -> list[int]:
    """The numbers of the labels, most frequent first, then in the order of their names."""
    return sorted(
        range(len(counts.labels)), key=lambda i: (-int(counts.totals[i]), counts.labels[i])
    )


def json_of(counts: Counts, order: Sequence[int]) -> dict[str, Any]:
    """The counts of some labels, by their numbers, as the verb prints them."""
    terms = []
    for number in order:
        values = counts.counts[number].tolist()
        term: dict[str, Any] = {"term": counts.labels[number], "count": values[-1]}
        term["by_checkpoint"] = {
            str(step): value for step, value in zip(counts.checkpoints, values, strict=True)
        }
        if counts.ids is not None:
            term["ids"] = counts.ids[number]
        terms.append(term)
    return {
        "terms": terms,
        "distinct": counts.found,
        "tokens": counts.tokens,
        "steps": counts.stop - counts.first,
    }


def as_text(counts: Counts, shown: Sequence[int]) -> str:
    """A table: a line a label, a column a checkpoint; then what was searched."""
    places = list(range(len(counts.checkpoints)))
    if len(places) > MOST_COLUMNS:
        # Evenly over the list, the last one among them.
        last = len(places) - 1
        places = sorted({last * i // (MOST_COLUMNS - 1) for i in range(MOST_COLUMNS)})
    # Spaces and line breaks are part of an n-gram.
    quoted = counts.ids is not None
    labels = [repr(counts.labels[i]) if quoted else counts.labels[i] for i in shown]
    width = max([len("term"), *map(len, labels)])
    heads = [f"step {counts.checkpoints[place]:,}" for place in places]
    lines = [f"{'term':<{width}}" + "".join(f"{head:>14}" for head in heads)]
    for number, label in zip(shown, labels, strict=True):
        values = [f"{counts.counts[number, place]:>14,}" for place in places]
        lines.append(f"{label:<{width}}" + "".join(values))
    rest = ""
    if counts.found > len(shown):
        rest = f"; {counts.found - len(shown):,} more"
    lines.append(f"{counts.tokens:,} tokens of steps {counts.first} to {counts.stop - 1}{rest}")
    return "\n".join(lines)
