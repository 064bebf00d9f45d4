"""The rows of steps, one by one: as lines of JSON, as text for reading, as tables of Parquet."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from castalia.core.extras import require
from castalia.core.files import atomic_write
from castalia.data.span_table import runs
from castalia.stream.batches import RECORD, OnSteps, Written, identity, job, tidy
from castalia.stream.batches_lines import LineFile
from castalia.stream.opening import Stream
from castalia.stream.processes import in_processes
from castalia.stream.viewing import record_of, require_own_tokenizer
from castalia.tokenizers.tokenizer import Tokenizer

Per = Literal["row", "span"]
EXTRA = "parquet"
PURPOSE = "castalia batches --mode parquet"
ROWS_OF_FILE = 1 << 16
"""Rows of a Parquet file in a folder of them: at 2,049 tokens each, 270 MB of uint16."""
SMALL = 128
"""Rows whose text is made in one task."""


def row_records(
    stream: Stream, steps: range, tokenizer: Tokenizer | None, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """One dict per row of the steps, as `castalia.stream.viewing.record_of` makes it.

    Raises  ConfigError if a token file was made with another tokenizer, or for steps that are not
            even planned.
    """
    places = stream.places(steps.start, steps.stop, planned=True)
    for records in records_of(stream, places, tokenizer, workers):
        yield from records


def records_of(
    stream: Stream, places: range, tokenizer: Tokenizer | None, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """The records of rows, a few at a time."""
    require_own_tokenizer(stream.rows, tokenizer)
    tasks = (places[begin : begin + SMALL] for begin in range(0, len(places), SMALL))
    return in_processes(stream, partial(some_records, tokenizer), tasks, workers)


def some_records(
    tokenizer: Tokenizer | None, stream: Stream, places: range
) -> list[dict[str, Any]]:
    """The records of some rows."""
    curriculum = stream.curriculum
    records = []
    for place in places:
        length = curriculum.length(stream.step_of(place)[0] + 1)
        records.append(record_of(stream.rows, place, stream.sizes, tokenizer, length))
    return records


def lines_to_file(
    stream: Stream,
    steps: range,
    tokenizer: Tokenizer | None,
    path: Path,
    *,
    workers: int = 0,
    overwrite: bool = False,
    on_steps: OnSteps = lambda count: None,
) -> Written:
    """Write a line of JSON for each row; an interrupted job goes on behind its last whole line.

    Raises  as `row_records`; ConfigError if the file is of another job.
    """
    name = None
    if tokenizer is not None:
        name = stream.config.data.tokenizer
    facts = {"mode": "jsonl", "tokenizer": name, "first": steps.start, **identity(stream)}
    places = stream.places(steps.start, steps.stop, planned=True)
    with LineFile(path, facts, steps.stop, overwrite) as file:
        begin = places.start
        if file.last is not None:
            begin = stream.sizes.first(int(file.last["step"])) + int(file.last["row"]) + 1
        done = stream.step_of(begin)[0] - steps.start
        on_steps(done)
        rows = 0
        step = steps.start + done
        for records in records_of(stream, range(begin, places.stop), tokenizer, workers):
            file.append(json.dumps(record, ensure_ascii=False) for record in records)
            rows += len(records)
            now = stream.step_of(begin + rows)[0]
            on_steps(now - step)
            step = now
    return Written(len(steps) - done, done, rows)


def text_of(record: dict[str, Any]) -> str:
    """A row for reading: where it stood, the documents in it, their texts.

    Without a tokenizer it has the documents alone.
    """
    lines = [f"step {record['step']}, row {record['row']}, source {record['source']}"]
    for document in record["documents"]:
        stop = document["start"] + document["length"]
        line = f"-- document {document['document']}, tokens {document['start']} to {stop - 1}"
        origin = document.get("from")
        if origin is not None:
            line += f", from {origin['source']}:{origin['line']}"
        lines.append(line)
        if "text" in document:
            lines.append(document["text"].rstrip("\n"))
    if "rejected" in record:
        rejected = {**record, **record["rejected"]}
        del rejected["rejected"]
        lines.append("-- rejected: " + text_of(rejected))
    return "\n".join(lines) + "\n"


def text_to_file(
    stream: Stream,
    steps: range,
    tokenizer: Tokenizer,
    path: Path,
    *,
    on_steps: OnSteps = lambda count: None,
) -> Written:
    """Write the rows as `text_of` has them, an empty line between two."""
    rows = 0
    with atomic_write(path) as file:
        for record in row_records(stream, steps, tokenizer):
            file.write(text_of(record) + "\n")
            rows += 1
            on_steps(record["row"] + 1 == stream.sizes.size(record["step"]))
    return Written(len(steps), 0, rows)


def parquet_batches(
    stream: Stream,
    steps: range,
    output: Path,
    *,
    per: Per = "row",
    workers: int = 0,
    overwrite: bool = False,
    on_steps: OnSteps = lambda count: None,
) -> Written:
    """Write the rows as Parquet: one file if `output` ends so, else a folder of files of many steps
    each, of which those that are there are kept.

    Columns  step and row int64, place int64 (in the run's order), source (text), document, start
             and length (int64; of a row, lists of them), tokens (list of the ids).
    A row group is a block of steps. `per` "span" has a line for each piece of a document.
    Raises   ConfigError as `job`, or without pyarrow; CastaliaError if it cannot be written.
    """
    require("pyarrow.parquet", EXTRA, PURPOSE)
    if output.suffix == ".parquet":
        return one_table(stream, steps, output, per, workers, on_steps)
    # With the end: the last file of a shorter range has some of the steps of a longer one's.
    bounds = [steps.start, steps.stop]
    facts = {"mode": "parquet", "per": per, "steps": bounds, **identity(stream)}
    with job(output / RECORD, facts, lambda: output.glob("steps-*.parquet"), overwrite):
        tidy(output, ".steps-*.parquet.*.tmp")
        missing = []
        for group in stream.groups(steps, ROWS_OF_FILE):
            if not table_path(output, group).exists():
                missing.append(group)
        left = sum(len(group) for group in missing)
        on_steps(len(steps) - left)
        rows = 0
        work = partial(write_group, output, per)
        groups = iter(missing)
        for count in in_processes(stream, work, missing, workers):
            rows += count
            on_steps(len(next(groups)))
    return Written(left, len(steps) - left, rows)


def table_path(folder: Path, steps: range) -> Path:
    """The file of some steps."""
    return folder / f"steps-{steps.start:08d}-{steps.stop - 1:08d}.parquet"


def write_group(folder: Path, per: Per, stream: Stream, steps: range) -> int:
    """Write the file of some steps; returns the number of rows."""
    one_table(stream, steps, table_path(folder, steps), per, 0, lambda count: None)
    return len(stream.places(steps.start, steps.stop, planned=True))


def one_table(
    stream: Stream, steps: range, path: Path, per: Per, workers: int, on_steps: OnSteps
) -> Written:
    """Write the rows of steps as one file, atomically."""
    parquet = require("pyarrow.parquet", EXTRA, PURPOSE)
    rows = 0
    with (
        atomic_write(path, "wb") as file,
        parquet.ParquetWriter(
            file,
            arrow_schema(stream, per),
            compression="zstd",
            # Ids repeat too little for a dictionary, which would cost most of the time.
            use_dictionary=["source"],
            write_page_checksum=True,
        ) as writer,
    ):
        groups = stream.groups(steps)
        for table in in_processes(stream, partial(table_of, per), stream.groups(steps), workers):
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            group = next(groups)
            rows += len(stream.places(group.start, group.stop, planned=True))
            on_steps(len(group))
    return Written(len(steps), 0, rows)


def arrow_schema(stream: Stream, per: Per) -> Any:
    """The columns of a table, with the run's facts as metadata."""
    pyarrow = require("pyarrow", EXTRA, PURPOSE)
    widest = np.result_type(*(side.dataset.dtype for side in stream.rows.train.row_sources))
    number = pyarrow.int64()
    of_spans = number
    if per != "span":
        of_spans = pyarrow.list_(number)
    columns = {
        "step": number,
        "row": number,
        "place": number,
        "source": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "document": of_spans,
        "start": of_spans,
        "length": of_spans,
        "tokens": pyarrow.list_(pyarrow.from_numpy_dtype(widest.newbyteorder("="))),
    }
    facts = json.dumps(identity(stream)).encode()
    return pyarrow.schema(list(columns.items()), {b"castalia.batches": facts})


def table_of(per: Per, stream: Stream, steps: range) -> Any:
    """The rows of some steps as a table."""
    pyarrow = require("pyarrow", EXTRA, PURPOSE)
    tables = []
    schema = arrow_schema(stream, per)
    kind = schema.field("tokens").type
    dtype = kind.value_type.to_pandas_dtype()
    for step in stream.batches(steps, dtype):
        block = step.seen
        table = block.table
        count, width = block.tokens.shape
        columns: dict[str, Any] = {
            "step": np.full(count, step.step),
            "row": np.arange(count),
            "place": np.array(block.places),
            "source": block.source,
        }
        fields = {"document": table.documents, "start": table.starts, "length": table.lengths}
        flat = block.tokens.reshape(-1)
        if per == "span":
            rows = table.row_of_span
            # What holds for a row stands in the line of each of its pieces.
            columns = {name: values[rows] for name, values in columns.items()} | fields
            flat = flat[runs(rows * width + table.offsets, table.lengths)]
            bounds = np.concatenate(([0], np.cumsum(table.lengths)))
        else:
            for name, values in fields.items():
                columns[name] = pyarrow.ListArray.from_arrays(table.bounds.astype("i4"), values)
            bounds = np.arange(count + 1) * width
        # Offsets of lists have 32 bits; the table is of one step, which stays far below.
        columns["tokens"] = pyarrow.ListArray.from_arrays(bounds.astype("i4"), flat)
        columns["source"] = pyarrow.DictionaryArray.from_arrays(columns["source"], stream.sources)
        tables.append(pyarrow.table(columns, schema=schema))
    return pyarrow.concat_tables(tables)
