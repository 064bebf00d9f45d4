"""`castalia batches`, also `castalia data view`: the exact rows that steps of a run train on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.terminal.flags import CONFIG, AsJson, grouped, note, panel

if TYPE_CHECKING:
    from castalia.stream.batches import Written
    from castalia.stream.opening import Stream

OUTPUT = panel("Output")
MODES = ("save", "custom", "text", "jsonl", "parquet")
HASHES = 20
"""Steps whose rows_hash is printed; --json has those of all."""
PYTHIA = "pythia-160m"
"""Whose batches the newer viewer of Pythia showed: those of all its models are the same."""

StepRange = Annotated[
    str | None,
    typer.Option(
        "--steps",
        "--step",
        metavar="A:B",
        help="Steps A to B - 1, counted from 0; A alone is one step.",
    ),
]


@dataclass(frozen=True)
class BatchFlags:
    """What is written of the steps, and where."""

    mode: Annotated[
        str | None,
        OUTPUT(
            metavar="MODE",
            help="save: a numpy file a step; custom: what --fn returns, a line a step; text and"
            " jsonl: the rows for reading and for programs; parquet: a table.",
        ),
    ] = None
    fn: Annotated[
        str | None,
        OUTPUT(
            metavar="MODULE:FUNCTION",
            help="custom: function(batch, step) returns a dict; batch is int64 (rows, tokens + 1)."
            " A third parameter gets sources and documents.",
        ),
    ] = None
    output: Annotated[
        str | None,
        OUTPUT(
            metavar="PATH",
            help="save: a folder; custom, jsonl, text: a file, by default the screen; parquet:"
            " FILE.parquet, or a folder of many.",
        ),
    ] = None
    ids: Annotated[
        str | None,
        OUTPUT(metavar="FILE", help="Write the ids as one .npy of shape (rows, tokens)."),
    ] = None
    jsonl: Annotated[str | None, OUTPUT(metavar="FILE", help="Write a JSON line for each row.")] = (
        None
    )
    per: Annotated[
        Literal["row", "span"],
        OUTPUT(
            metavar="row|span",
            help="parquet: a line for each row, or for each piece of a document.",
        ),
    ] = "row"
    tokenizer: Annotated[
        str | None,
        OUTPUT(metavar="FILE", help="For the text; by default data.tokenizer of the config."),
    ] = None
    workers: Annotated[
        int, OUTPUT(metavar="N", min=0, help="Processes that share the steps; 0 is this one.")
    ] = 0
    planned: Annotated[
        bool, OUTPUT("--planned", help="Also steps that the run has not trained yet.")
    ] = False
    verify: Annotated[
        bool,
        OUTPUT("--verify", help="First compare the rows with the rows_hash that training wrote."),
    ] = False
    overwrite: Annotated[
        bool, OUTPUT("--overwrite", help="Replace the files of another job that are there.")
    ] = False


@dataclass(frozen=True)
class OldViewer:
    """The options of Pythia's utils/batch_viewer.py, the first one's and the newer one's."""

    start_iteration: Annotated[int | None, OUTPUT("--start_iteration", hidden=True)] = None
    end_iteration: Annotated[int | None, OUTPUT("--end_iteration", hidden=True)] = None
    load_path: Annotated[str | None, OUTPUT("--load_path", hidden=True)] = None
    save_path: Annotated[str | None, OUTPUT("--save_path", hidden=True)] = None
    conf_dir: Annotated[str | None, OUTPUT("--conf_dir", hidden=True)] = None


@grouped
def batches(
    ctx: typer.Context,
    flags: BatchFlags,
    old: OldViewer,
    config: Annotated[list[str] | None, CONFIG] = None,
    steps: StepRange = None,
    as_json: AsJson = False,
) -> None:
    """Show, save or count over the exact rows that steps of a run train on.

    --steps A:B are steps A, A + 1, …, B - 1, counted from 0: B is exclusive. Step s is the update
    from checkpoint s to checkpoint s + 1, so checkpoint N has read the rows of steps 0:N.

    Without an output the rows go to the screen as JSON lines. Files appear when they are whole; the
    same command goes on after an interruption. With --ids or --jsonl the screen gets a line for
    each of the first 20 steps with its rows_hash, which the run's metrics.jsonl has at step s + 1;
    --json has all. The options of Pythia's batch_viewer.py are understood.

    Examples:

      castalia batches runs/demo --steps 2 --mode text

      castalia batches runs/demo --steps 0:9 --mode save --output batches

      castalia batches runs/demo --steps 0:9 --fn mine:of_batch --output s.jsonl
    """
    words, steps, flags = as_ours(list(config or ()), steps, flags, old)
    require_words(ctx, words, steps)
    flags = with_mode(flags)
    from castalia.stream.opening import open_stream
    from castalia.stream.viewing import parse_steps

    stream = open_stream(words, note)
    chosen = parse_steps(str(steps), stream.sizes, stream.steps)
    stream.check_steps(chosen.first, chosen.stop, planned=flags.planned)
    run(stream, range(chosen.first, chosen.stop), flags, as_json)


def as_ours(
    words: list[str], steps: str | None, flags: BatchFlags, old: OldViewer
) -> tuple[list[str], str | None, BatchFlags]:
    """Config words, steps and flags that mean what the options of Pythia's viewers do.

    The first viewer left the end of the range out, the newer one, which has --load_path, has it in.
    """
    if old.conf_dir is not None:
        words = [old.conf_dir, *words]
    if old.load_path is not None:
        if all("=" in word for word in words):
            words = [PYTHIA, *words]
        words = [*words, f"data.train={old.load_path}", "data.order=file"]
    if old.start_iteration is not None or old.end_iteration is not None:
        stop = ""
        if old.end_iteration is not None:
            stop = str(old.end_iteration + (old.load_path is not None))
        steps = steps or f"{old.start_iteration or 0}:{stop}"
    if old.load_path is not None and flags.mode is None and flags.ids is None:
        flags = replace(flags, ids=str(Path(old.save_path or ".") / "indicies.npy"))
    elif old.save_path is not None:
        flags = replace(flags, output=flags.output or old.save_path)
    if old != OldViewer():
        options = [f"--steps {steps}"]
        for name in ("mode", "fn", "output", "ids"):
            if getattr(flags, name) is not None:
                options.append(f"--{name} {getattr(flags, name)}")
        text = f"castalia: as castalia batches {' '.join([*words, *options])}"
        typer.echo(text, err=True)
    return words, steps, flags


def require_words(ctx: typer.Context, words: list[str], steps: str | None) -> None:
    """Raises  ConfigError if the command line lacks a config or steps."""
    from castalia.core.errors import ConfigError
    from castalia.terminal.command import first_example

    for name, value in (("CONFIG", words), ("--steps", steps)):
        if not value:
            example = first_example(ctx.command.help or "")
            raise ConfigError(f"{ctx.command_path} needs {name}{example}")


def with_mode(flags: BatchFlags) -> BatchFlags:
    """The flags with the mode that they imply.

    Raises  ConfigError if they do not go together.
    """
    from castalia.core.errors import ConfigError, nearest

    if flags.mode is not None and flags.mode not in MODES:
        hint = nearest(flags.mode, MODES)
        raise ConfigError(f"--mode {flags.mode}: expected {', '.join(MODES)}{hint}")
    mode = flags.mode
    if mode is None and flags.fn is not None:
        mode = "custom"
    elif mode is None and flags.output is not None:
        mode = "parquet" if flags.output.endswith(".parquet") else "jsonl"
    if (mode == "custom") != (flags.fn is not None):
        raise ConfigError("--mode custom and --fn MODULE:FUNCTION go together")
    if mode in ("save", "parquet") and flags.output is None:
        what = "FOLDER" if mode == "save" else "FILE.parquet or a folder"
        raise ConfigError(f"--mode {mode} needs --output {what}")
    if mode is not None and (flags.ids or flags.jsonl):
        raise ConfigError(f"--ids and --jsonl are without --mode {mode} and --output")
    return replace(flags, mode=mode)


def run(stream: "Stream", steps: range, flags: BatchFlags, as_json: bool) -> None:
    """Do what the flags say, and say what was done."""
    import json
    import time

    from castalia.stream.batches import verify_batches

    began = time.perf_counter()
    summary: dict[str, Any] = {"steps": [steps.start, steps.stop], "mode": flags.mode or "jsonl"}
    if flags.verify:
        with progress("verify", steps) as on_steps:
            compared = verify_batches(stream, steps, workers=flags.workers, on_steps=on_steps)
        summary["verified"] = compared
        only = flags == BatchFlags(verify=True, workers=flags.workers)
        typer.echo(f"{compared:,} steps: the rows that training hashed", err=as_json or not only)
        if only:
            if as_json:
                typer.echo(json.dumps(summary))
            return
    if flags.output is None:  # save and parquet have one
        show(stream, steps, flags, summary, as_json)
        return
    with progress(str(flags.mode), steps) as on_steps:
        written = write(stream, steps, flags, on_steps)
    place = flags.output
    summary |= {"output": place, "written": written.steps, "skipped": written.skipped}
    summary |= {"rows": written.rows, "seconds": round(time.perf_counter() - began, 3)}
    if as_json:
        typer.echo(json.dumps(summary))
        return
    kept = f"; {written.skipped:,} were there" if written.skipped else ""
    typer.echo(f"{place}: {written.steps:,} steps, {written.rows:,} rows written{kept}")


def write(
    stream: "Stream", steps: range, flags: BatchFlags, on_steps: Callable[[int], Any]
) -> "Written":
    """Write the files of a mode."""
    from castalia.stream.batches import save_batches
    from castalia.stream.batches_lines import custom_batches
    from castalia.stream.batches_rows import lines_to_file, parquet_batches, text_to_file

    output = Path(str(flags.output))
    options: dict[str, Any] = {
        "workers": flags.workers,
        "overwrite": flags.overwrite,
        "on_steps": on_steps,
    }
    if flags.mode == "save":
        return save_batches(stream, steps, output, **options)
    if flags.mode == "parquet":
        return parquet_batches(stream, steps, output, per=flags.per, **options)
    if flags.mode == "custom":
        path = output if output.suffix in (".jsonl", ".json") else output / "stats.jsonl"
        return custom_batches(stream, steps, str(flags.fn), path, **options)
    if flags.mode == "text":
        decoder = decoder_of(stream, flags, needed=True)
        return text_to_file(stream, steps, decoder, output, on_steps=on_steps)
    return lines_to_file(stream, steps, decoder_of(stream, flags), output, **options)


def show(
    stream: "Stream", steps: range, flags: BatchFlags, summary: dict[str, Any], as_json: bool
) -> None:
    """Rows, or what a function says of them, on the screen; and files of --ids and --jsonl."""
    import json

    from castalia.stream.batches_lines import called_lines
    from castalia.stream.batches_rows import row_records, text_of

    if flags.ids or flags.jsonl:
        show_hashes(stream, steps, flags, summary, as_json)
        return
    if flags.mode == "custom":
        lines = called_lines(stream, steps, str(flags.fn), flags.workers)
    else:
        decoder = decoder_of(stream, flags, needed=flags.mode == "text")
        rows = row_records(stream, steps, decoder, flags.workers)
        if flags.mode == "text" and not as_json:
            for record in rows:
                typer.echo(text_of(record))
            return
        lines = (json.dumps(record, ensure_ascii=False) for record in rows)
    if not as_json:
        for line in lines:
            typer.echo(line)
        return
    # One value, written as it is made: the rows of many steps are not held.
    head = json.dumps(summary)[:-1]
    name = "records" if flags.mode == "custom" else "rows"
    typer.echo(f'{head}, "{name}": [', nl=False)
    for number, line in enumerate(lines):
        typer.echo(f"{',' if number else ''}\n{line}", nl=False)
    typer.echo("\n]}")


def show_hashes(
    stream: "Stream", steps: range, flags: BatchFlags, summary: dict[str, Any], as_json: bool
) -> None:
    """Write the files of --ids and --jsonl, and a line for each of the first steps with its
    rows_hash."""
    import json

    from castalia.core.files import atomic_write
    from castalia.stream.batches import hash_group
    from castalia.stream.batches_rows import row_records
    from castalia.stream.processes import in_processes
    from castalia.stream.viewing import Steps, save_ids

    if flags.ids:
        save_ids(stream.rows.train, Steps(steps.start, steps.stop, stream.sizes), flags.ids)
    if flags.jsonl:
        records = row_records(stream, steps, decoder_of(stream, flags), flags.workers)
        with atomic_write(flags.jsonl) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    hashes = {}
    # The rows of a step are read again for its hash, and nobody reads 143,000 lines.
    hashed = steps if as_json else steps[:HASHES]
    for group in in_processes(stream, hash_group, stream.groups(hashed), flags.workers):
        for step, rows_hash in group:
            if as_json:
                hashes[step] = rows_hash
                continue
            size = stream.sizes.size(step)
            typer.echo(f"step {step}: {size:,} rows, rows_hash {rows_hash}")
    if as_json:
        written = {"ids": flags.ids, "jsonl": flags.jsonl, "rows_hash": hashes}
        typer.echo(json.dumps(summary | written))
    elif len(steps) > len(hashed):
        typer.echo(f"and {len(steps) - len(hashed):,} more steps; --verify compares their hashes")


def decoder_of(stream: "Stream", flags: BatchFlags, needed: bool = False) -> Any:
    """The tokenizer that makes the text; None if nothing names one.

    Raises  ConfigError if it is `needed` and nothing names one.
    """
    from castalia.tokenizers.tokenizer import load_tokenizer

    if flags.tokenizer is not None:
        return load_tokenizer(flags.tokenizer)
    if needed:
        return stream.tokenizer_for("--mode text")
    return stream.tokenizer


@contextmanager
def progress(verb: str, steps: range) -> Iterator[Callable[[int], Any]]:
    """Progress over steps; yields a callback that takes how many more are done."""
    from castalia.terminal.progress import counted_progress

    done = 0
    with counted_progress(f"{verb}, steps") as show_done:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show_done("", done, len(steps))

        yield advance
