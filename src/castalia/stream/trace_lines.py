"""A trace as lines to read: where the text stands, what is around it, when it was seen."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np

from castalia.corpus.provenance import read_provenance
from castalia.stream.tracing import Trace

AROUND = 12
"""Tokens shown before and after the text."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60
"""Most bars of the histogram."""
HEADS = ("step", "row", "epoch", "source", "document", "offset")
ORIGINS = 10
"""Most documents whose origin is named."""
HOW = {
    "index": "the index",
    "files": "the token files",
    "rows": "the rows as steps read them",
}

Mark = Callable[[str], str]


def trace_lines(trace: Trace, shown: str, limit: int, mark: Mark) -> Iterator[str]:
    """The lines of a trace; `mark` sets the text apart in its context, `shown` is its name."""
    yield headline(trace, shown)
    forms = (f"{times(len(form.ids), 'token')} {form.name}" for form in trace.forms)
    yield f"looked for {', '.join(forms)} in {HOW[trace.how]}: {trace.seconds:.3f} s"
    yield from trace.notes
    if not len(trace):
        return
    yield ""
    yield from occurrence_lines(trace, limit, mark)
    yield from origin_lines(trace, limit)
    yield ""
    yield f"steps 0 to {trace.stop - 1}  {histogram(trace)}"
    yield from checkpoint_lines(trace)


def headline(trace: Trace, shown: str) -> str:
    """How often the text stands where."""
    found = trace.found
    line = f"{shown}: {times(len(trace), 'occurrence')} in steps 0 to {trace.stop - 1}"
    if len(trace):
        documents = np.unique(np.stack([found.source, found.document]), axis=1).shape[1]
        steps = len(np.unique(trace.steps[0]))
        line += f", in {times(steps, 'step')} and {times(documents, 'document')}"
    elif trace.in_files:
        line += f"; the token files have it {times(trace.in_files, 'time')}"
    if trace.split:
        line += f"; the border of a row cuts {trace.split:,} more"
    return line


def times(count: int, noun: str) -> str:
    """A number and a noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def occurrence_lines(trace: Trace, limit: int, mark: Mark) -> Iterator[str]:
    """A line for each occurrence with the line of its context under it."""
    records = list(trace.records(limit))
    table = [HEADS, *(tuple(str(record[name]) for name in HEADS) for record in records)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADS))]
    yield "  ".join(name.rjust(width) for name, width in zip(HEADS, widths, strict=True))
    for number, row in enumerate(table[1:]):
        yield "  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True))
        yield "    " + context(trace, number, mark)
    if len(trace) > limit:
        yield f"… {len(trace) - limit:,} more; --limit {len(trace)} or --json shows all"


def context(trace: Trace, number: int, mark: Mark) -> str:
    """The text of an occurrence with the tokens around it, as its step read them."""
    found = trace.found
    place = int(found.place[number])
    row = trace.stream.block(range(place, place + 1)).tokens[0]
    begin = int(found.at[number])
    end = begin + int(found.length[number])
    stop = min(end + AROUND, len(row))
    pieces = [row[max(0, begin - AROUND) : begin], row[begin:end], row[end:stop]]
    tokenizer = trace.stream.tokenizer
    if tokenizer is None:
        before, own, after = (" ".join(map(str, piece.tolist())) for piece in pieces)
        return f"{before} {mark(own)} {after}".strip()
    before, own, after = (one_line(tokenizer.decode(piece)) for piece in pieces)
    head = ""
    if begin > AROUND:
        head = "…"
    tail = ""
    if stop < len(row):
        tail = "…"
    return f"{head}{before}{mark(own)}{after}{tail}"


def one_line(text: str) -> str:
    """A text with signs for its line ends and tabs."""
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


def origin_lines(trace: Trace, limit: int) -> Iterator[str]:
    """Where the documents of the occurrences shown came from, as far as an index of them knows."""
    found = trace.found
    stop = min(limit, len(trace))
    pairs = zip(found.source[:stop].tolist(), found.document[:stop].tolist(), strict=True)
    lines = []
    for source, document in list(dict.fromkeys(pairs))[:ORIGINS]:
        prefix = trace.stream.rows.train.row_sources[source].dataset.prefix
        origin = None
        if document >= 0:
            origin = read_provenance(prefix, document)
        if origin is not None:
            name = trace.stream.sources[source]
            lines.append(f"{name} {document}: {origin_text(origin)}")
    if lines:
        yield ""
        yield from lines


def origin_text(origin: dict[str, Any]) -> str:
    """The origin of a document: file and line, then the metadata that was kept."""
    place = str(origin["source"])
    if origin["member"]:
        place += f"({origin['member']})"
    own = ("source", "member", "line", "start", "stop", "tokens", "hash")
    rest = [f"{name}={value}" for name, value in origin.items() if name not in own and value]
    return " ".join([f"{place}:{origin['line']}", *rest])


def histogram(trace: Trace) -> str:
    """Occurrences over the steps as bars; a step range without any is a dot."""
    bins = min(WIDTH, trace.stop)
    counts = np.bincount(trace.steps[0] * bins // trace.stop, minlength=bins)
    # The lowest bar is for one or a few, so that a single occurrence is seen.
    heights = -(-counts * len(BARS) // counts.max()) - 1
    return "".join(
        "·" if count == 0 else BARS[height]
        for count, height in zip(counts.tolist(), heights.tolist(), strict=True)
    )


def checkpoint_lines(trace: Trace) -> Iterator[str]:
    """How often the saved checkpoints had seen the text, those of one number together."""
    seen = trace.seen_before()
    if not seen:
        return
    groups = [
        (count, [step for step, _ in own])
        for count, own in groupby(seen.items(), key=lambda pair: pair[1])
    ]
    # Saved steps are far apart, and many of them have seen a text as often.
    names = [" to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))) for _, steps in groups]
    width = max(map(len, names))
    yield ""
    yield "seen before checkpoint"
    for name, (count, _) in zip(names, groups, strict=True):
        yield f"  {name:>{width}}  {times(count, 'time')}"
