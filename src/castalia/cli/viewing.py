"""`castalia data materialize`, and `data view`, the older name of `castalia batches`."""

import inspect
from typing import Annotated

import typer

from castalia.cli.batches import batches
from castalia.cli.data import RUNS, Output, app, print_record
from castalia.terminal.flags import AsJson, Config, Overwrite, note

StepRange = Annotated[
    str,
    typer.Option(
        "--steps",
        "--step",
        metavar="A:B",
        help="Steps A to B - 1, counted from 0; A alone is one step.",
    ),
]


# The older name of `castalia batches`, which was for viewing alone.
HELP = inspect.cleandoc(batches.__doc__ or "").replace("castalia batches", "castalia data view")
app.command("view", rich_help_panel=RUNS, help=HELP)(batches)


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
    from castalia.data.batch_sizes import require_constant
    from castalia.data.ready_rows import common_dtype, write_rows
    from castalia.stream.opening import open_stream
    from castalia.stream.viewing import parse_steps
    from castalia.terminal.progress import bytes_progress

    stream = open_stream(config, note)
    rows = stream.rows
    chosen = parse_steps(steps, stream.sizes, stream.steps)
    stream.check_steps(chosen.first, chosen.stop, planned=True)
    facts = {
        "rows_of": {
            "first_step": chosen.first,
            "stop_step": chosen.stop,
            "batch_size": require_constant(stream.sizes, "a token file of ready rows"),
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
