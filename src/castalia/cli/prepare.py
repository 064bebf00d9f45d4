"""`castalia prepare`: text to a token file."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

INPUTS = (
    "Text files (one document each), JSON lines (.jsonl, .ndjson, .json), .tar of these, .gz, .zst or .xz of any of"
    " them; .parquet; folders; patterns such as 'part-*.jsonl.zst'."
)


def prepare(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help=INPUTS)],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json, or `bytes` for the byte-level one.")
    ],
    output: Annotated[
        str,
        typer.Option("--output", metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and a manifest, PREFIX.json."),
    ],
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="End each document with the tokenizer's end-of-document token.")
    ] = False,
    key: Annotated[
        str, typer.Option("--key", help="Key of the text in a JSON line; column of the text in Parquet.")
    ] = "text",
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            "--train-tokenizer",
            metavar="N",
            min=1,
            help="First train a BPE of N ids on INPUT and write it to --tokenizer.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that tokenize; 1 is this one, and uses all cores.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Tokenize text into the memory-mapped .bin/.idx format of GPT-NeoX.

    Documents keep the order of the inputs; those without a token are left out and counted.
    """
    from dataclasses import asdict

    from castalia.data.prepare import prepare as run

    with progress_bar(inputs, passes=2 if train_tokenizer else 1) as on_read:
        done = run(
            inputs,
            output,
            tokenizer,
            append_eod=append_eod,
            key=key,
            train_vocab=train_tokenizer,
            workers=workers,
            on_read=on_read,
        )
    if as_json:
        typer.echo(json.dumps(asdict(done) | {"megabytes_per_second": round(done.megabytes_per_second, 3)}))
        return
    left_out = f" ({done.empty:,} empty left out)" if done.empty else ""
    typer.echo(
        f"{done.prefix}: {done.documents:,} documents{left_out}, {done.tokens:,} tokens as {done.dtype},"
        f" {done.text_bytes / 1e6:,.2f} MB of text in {done.seconds:.1f} s ({done.megabytes_per_second:.1f} MB/s)"
    )


@contextmanager
def progress_bar(inputs: list[Path], passes: int) -> Iterator[Callable[[int], None] | None]:
    """A bar over the bytes of the inputs, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from castalia.data.readers import list_files

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    total = passes * sum(file.path.stat().st_size for file in list_files(inputs))
    columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("prepare", total=total)
        yield lambda count: bar.advance(task, count)
