"""`castalia data view` and `materialize`: the exact rows that the steps of a run train on."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.data import RUNS, Output, app, print_record
from castalia.cli.flags import AsJson, Config, Overwrite

if TYPE_CHECKING:
    from castalia.data import RunRows
    from castalia.runs.config import RunConfig

StepRange = Annotated[
    str,
    typer.Option(
        "--steps",
        "--step",
        metavar="A:B",
        help="Steps A to B - 1, counted from 0; A alone is one step.",
    ),
]


@app.command(rich_help_panel=RUNS)
def view(
    config: Config,
    steps: StepRange,
    ids: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the ids as one .npy of shape (rows, tokens)."),
    ] = None,
    jsonl: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a JSON line for each row.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For the text; by default data.tokenizer of the config."),
    ] = None,
) -> None:
    """Show the rows of steps of a run: ids, text, source, documents and offsets.

    --steps A:B are steps A, A + 1, …, B - 1, counted from 0: B is exclusive. Step s is the update
    from checkpoint s to checkpoint s + 1, so checkpoint N has read the rows of steps 0:N.

    Without --ids and --jsonl the JSON lines go to the screen. With one of them the screen gets a
    line a step with its rows_hash, which the run's metrics.jsonl has at step s + 1.

    Examples:

      castalia data view runs/demo --steps 2

      castalia data view runs/demo --steps 0:2 --ids batches.npy --jsonl rows.jsonl
    """
    from castalia.core.files import atomic_write
    from castalia.data import load_tokenizer
    from castalia.stream.viewing import parse_steps, records, save_ids, step_hash

    run, rows = rows_of(config)
    chosen = parse_steps(steps, run.train.batches, run.train.steps)
    name = tokenizer or run.data.tokenizer
    decoder = None
    if name:
        decoder = load_tokenizer(name)
    # A generator: a whole run's rows would not fit in memory.
    lines = (json.dumps(record, ensure_ascii=False) for record in records(rows, chosen, decoder))
    if ids:
        save_ids(rows.train, chosen, ids)
    if jsonl:
        with atomic_write(jsonl) as file:
            file.writelines(line + "\n" for line in lines)
    if not ids and not jsonl:
        for line in lines:
            typer.echo(line)
        return
    for step in range(chosen.first, chosen.stop):
        rows_hash = step_hash(rows.train, step, run.train.batches)
        size = run.train.batches.size(step)
        typer.echo(f"step {step}: {size:,} rows, rows_hash {rows_hash}")


@app.command(rich_help_panel=RUNS)
def materialize(
    config: Config,
    steps: StepRange,
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows of steps of a run, in their order, as a token file of ready rows.

    Each item is a row of data.seq_length + 1 tokens. --steps A:B are steps A to B - 1, counted from
    0; `:` is the whole run. Item i is row i mod B of step A + i // B, where B is train.batch_size:
    the form of Pythia's preshuffled files.

    `castalia train … data.train=PREFIX data.order=file` reads them in this order.

    Example:

      castalia data materialize runs/demo --steps : --output data/ready
    """
    from castalia.cli.progress import bytes_progress
    from castalia.data.batch_sizes import require_constant
    from castalia.data.ready_rows import common_dtype, write_rows
    from castalia.stream.viewing import parse_steps

    run, rows = rows_of(config)
    chosen = parse_steps(steps, run.train.batches, run.train.steps)
    facts = {
        "rows_of": {
            "first_step": chosen.first,
            "stop_step": chosen.stop,
            "batch_size": require_constant(run.train.batches, "a token file of ready rows"),
        },
        "seq_length": rows.train.seq_length,
        "fingerprint": rows.fingerprint,
    }
    places = chosen.places
    dtype = common_dtype([source.dataset for source in rows.train.row_sources])
    size = len(places) * (rows.train.seq_length + 1) * dtype.itemsize
    with bytes_progress("materialize", [], size) as advance:
        record = write_rows(
            rows.train, places.start, places.stop, output, facts, advance, overwrite=overwrite
        )
    print_record(output, record, as_json)


def rows_of(words: list[str]) -> "tuple[RunConfig, RunRows]":
    """The config that `words` give, and its run's rows: as recorded, or as training builds them."""
    from castalia.recipes import resolve
    from castalia.runs.rows import rows_as_trained

    return rows_as_trained(resolve(words).config, lambda text: typer.echo(text, err=True))
