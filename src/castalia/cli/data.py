"""`castalia data …`: look into token files, check, cut, join, merge and split them, and see what steps train on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from castalia.curate.describe import Description
    from castalia.data import IndexedDataset, RunRows
    from castalia.train.config import RunConfig

app = typer.Typer(
    help="Look into token files, check, cut, join, merge, split them, and see what steps train on.",
    no_args_is_help=True,
)

Prefix = Annotated[
    str,
    typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx, or shards of PREFIX.bin."),
]
Prefixes = Annotated[
    list[str], typer.Argument(metavar="PREFIX...", help="Token files; each whole or in shards.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Hashes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="SHA-256 by file name: Pythia's shard_hashes.txt, or sha256sum's output.",
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [a.b=c ...]",
        help="As for `castalia train`: a preset, YAML files, overrides.",
    ),
]
StepRange = Annotated[
    str, typer.Option(metavar="A:B", help="Steps A to B - 1, counted from 0; A alone is one step.")
]
SHARD_BYTES = 5_000_000_000
"""Pythia's; the same number as in castalia.data.shards, which help must not import."""


@app.command()
def inspect(
    prefix: Prefix,
    document: Annotated[
        int | None, typer.Option(help="Show this document; counts from 0, -1 is the last.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Decode with a tokenizer.json, or `bytes`; else ids are shown."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Counts, lengths and dtype of a token file, and the text of one document.

    Example:

      castalia data inspect data/corpus --document 0 --tokenizer tokenizer.json
    """
    from castalia.curate.describe import describe
    from castalia.data import IndexedDataset

    dataset = IndexedDataset(prefix)
    shown = None if document is None else one_document(dataset, document, tokenizer)
    facts = describe(dataset)
    if as_json:
        typer.echo(
            json.dumps(
                asdict(facts) | ({} if shown is None else {"document": shown}), ensure_ascii=False
            )
        )
        return
    print_facts(facts)
    if shown is not None:
        typer.echo(f"\ndocument {shown['number']}, {shown['tokens']:,} tokens")
        if "from" in shown:
            typer.echo(origin_line(shown["from"]))
        typer.echo(shown.get("text") if tokenizer else " ".join(map(str, shown["ids"])))


def one_document(dataset: "IndexedDataset", number: int, tokenizer: str | None) -> dict[str, Any]:
    """Number, length and ids or text of one document.

    Raises  ConfigError if there is no such document, or the tokenizer is not that of the token file.
    """
    from castalia.core.errors import ConfigError
    from castalia.corpus.provenance import read_provenance
    from castalia.data import load_tokenizer
    from castalia.data.sidecar import require_tokenizer

    count = len(dataset)
    if not -count <= number < count:
        raise ConfigError(
            f"--document {number}: {dataset.prefix} has {count} documents, 0 to {count - 1}"
        )
    ids = dataset[number].tolist()
    content: dict[str, Any] = {"ids": ids}
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
        require_tokenizer(str(dataset.prefix), chosen)
        content = {"text": chosen.decode(ids)}
    origin = read_provenance(dataset.prefix, number % count)
    return {
        "number": number % count,
        "tokens": len(ids),
        **content,
        **({} if origin is None else {"from": origin}),
    }


def origin_line(origin: dict[str, Any]) -> str:
    """Where a document came from: file and line, then what else is known."""
    place = origin["source"] + (f"({origin['member']})" if origin["member"] else "")
    rest = [f"{name}={value}" for name, value in origin.items() if value is not None][1:]
    return f"from {place}:{origin['line']}  {' '.join(part for part in rest if not part.startswith(('member=', 'line=')))}"


def print_facts(facts: "Description") -> None:
    """The facts as lines, the lengths with a bar for each power of two."""
    from castalia.monitor.display import size_text

    shards = f" in {facts.shards} shards" if facts.shards else ""
    typer.echo(
        f"{facts.prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens as {facts.dtype},",
        nl=False,
    )
    typer.echo(f" {size_text(facts.bytes)}{shards}")
    typer.echo(
        f"tokens a document: least {facts.shortest:,}, mean {facts.mean:,.1f}, median {facts.median:,.1f},"
        f" most {facts.longest:,}; {facts.empty:,} empty"
    )
    if facts.maps:
        typer.echo(
            f"index maps: {facts.maps} files, {size_text(facts.maps_bytes)} in {facts.prefix}.order"
        )
    most = max((count for _, count in facts.histogram), default=1)
    for least, count in facts.histogram:
        label = "0" if least == 0 else f"{least:,}-{2 * least - 1:,}"
        typer.echo(f"{label:>27} {count:>13,} {'#' * -(-40 * count // most)}")


@app.command()
def count(prefixes: Prefixes, as_json: AsJson = False) -> None:
    """Documents and tokens of token files, and their sums."""
    from castalia.curate.describe import describe
    from castalia.data import IndexedDataset

    found = [describe(IndexedDataset(prefix)) for prefix in prefixes]
    sums = {"documents": sum(f.documents for f in found), "tokens": sum(f.tokens for f in found)}
    if as_json:
        files = [
            {"prefix": f.prefix, "documents": f.documents, "tokens": f.tokens, "dtype": f.dtype}
            for f in found
        ]
        typer.echo(json.dumps({"files": files, **sums}))
        return
    for facts in found:
        typer.echo(
            f"{facts.prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens as {facts.dtype}"
        )
    if len(found) > 1:
        typer.echo(f"all: {sums['documents']:,} documents, {sums['tokens']:,} tokens")


@app.command()
def verify(
    prefixes: Prefixes,
    hashes: Hashes = None,
    write_hashes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write the files' hashes to FILE, in the form of Pythia's list."
        ),
    ] = None,
    shard_bytes: Annotated[
        int,
        typer.Option(
            min=1, help="Size of listed shards, to check a whole .bin by a list of its shards."
        ),
    ] = SHARD_BYTES,
    as_json: AsJson = False,
) -> None:
    """Check token files: structure, their .json record, and hashes from a list; fails on any finding.

    A file that the list names and that is not there is a failure, as is one of the prefix that the list does not name.

    Example:

      castalia data verify pile_0.87_deduped_text_document --hashes shard_hashes.txt
    """
    from castalia.core.errors import ConfigError, DataError
    from castalia.curate.verify import read_hashes
    from castalia.curate.verify import verify as checks

    if hashes and write_hashes:
        raise ConfigError("give --hashes to check or --write-hashes to write, not both")
    listed = read_hashes(hashes) if hashes else None
    with bar("verify", prefixes) as on_bytes:
        found = list(checks(prefixes, listed, shard_bytes=shard_bytes, on_bytes=on_bytes))
    for check in found:
        text = f"{'ok  ' if check.ok else 'FAIL'} {check.about:9} {check.file}: {check.wrong or 'right'}"
        typer.echo(json.dumps(asdict(check) | {"ok": check.ok}) if as_json else text)
    wrong = sum(not check.ok for check in found)
    if wrong:
        raise DataError(f"{wrong} of {len(found)} checks failed")
    if write_hashes:
        write_list(prefixes, write_hashes)


def write_list(prefixes: list[str], path: str) -> None:
    """Write the hashes of the prefixes' files, one a line."""
    from castalia.core.files import atomic_write
    from castalia.curate.verify import hash_list

    with bar("hash", prefixes) as on_bytes, atomic_write(path) as file:
        for prefix in prefixes:
            file.writelines(
                f"{name} {digest}\n" for name, digest in hash_list(prefix, on_bytes).items()
            )


@app.command()
def shard(
    prefix: Prefix,
    output: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder of the shards; .idx and .json go along.")
    ],
    size: Annotated[
        int, typer.Option("--bytes", min=1, help="Bytes of each shard but the last.")
    ] = SHARD_BYTES,
) -> None:
    """Cut PREFIX.bin into shards as Pythia publishes them: BASE-00000-of-00082.bin, the second number the last shard's.

    Shards need not be joined again: every verb reads them in place. The same command again keeps what is right.
    """
    from castalia.curate.resharding import shard as cut

    with bar("shard", [prefix]) as on_bytes:
        written = cut(prefix, output, size=size, on_bytes=on_bytes)
    typer.echo(
        f"{written[0]} to {written[-1].name}: {len(written)} shards of {size:,} bytes, the last may be shorter"
    )


@app.command()
def unshard(
    prefix: Prefix,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder of the whole .bin; by default that of the shards."
        ),
    ] = None,
    hashes: Hashes = None,
    as_json: AsJson = False,
) -> None:
    """Join the shards of PREFIX into one .bin. Interrupted, the same command goes on; finished, it compares.

    PREFIX may be the name of any one shard. Sizes are checked first, hashes on the way if a list is given.
    """
    from castalia.curate.resharding import unshard as join
    from castalia.curate.verify import read_hashes

    listed = read_hashes(hashes) if hashes else None
    with bar("unshard", [prefix]) as on_bytes:
        done = join(prefix, output, hashes=listed, on_bytes=on_bytes)
    if as_json:
        typer.echo(json.dumps(asdict(done) | {"path": str(done.path)}))
        return
    kept = f", {done.kept:,} of them there before" if done.kept else ""
    typer.echo(
        f"{done.path}: {done.shards} shards, {done.bytes:,} bytes{kept}, SHA-256 {done.sha256}"
    )


@app.command()
def merge(
    prefixes: Prefixes,
    output: Annotated[
        str, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json.")
    ],
    as_json: AsJson = False,
) -> None:
    """One token file out of several of the same dtype, documents in the order of the inputs.

    Example:

      castalia data merge data/a data/b --output data/both
    """
    from castalia.curate.joining import merge as join

    with bar("merge", prefixes) as on_bytes:
        record = join(prefixes, output, on_bytes=on_bytes)
    typer.echo(json.dumps(record) if as_json else line(Path(output).parent, record))


@app.command()
def split(
    prefix: Prefix,
    output: Annotated[
        str,
        typer.Option(
            metavar="PREFIX", help="Writes PREFIX-train, -valid, -test, or PREFIX-part0 …"
        ),
    ],
    shares: Annotated[
        str | None,
        typer.Option(help="Shares of train, valid and test as in data.split: '969, 30, 1'."),
    ] = None,
    parts: Annotated[
        int | None, typer.Option(help="So many parts of nearly as many documents each.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Several token files out of one, by whole documents in their order.

    --shares cuts exactly where data.split does, which is GPT-NeoX's rule; a share without documents writes nothing.
    """
    from castalia.curate.joining import split as divide

    with bar("split", [prefix]) as on_bytes:
        records = divide(prefix, output, shares=shares, parts=parts, on_bytes=on_bytes)
    for record in records:
        typer.echo(json.dumps(record) if as_json else line(Path(output).parent, record))


@app.command()
def view(
    sources: Sources,
    steps: StepRange,
    ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the ids as one .npy, (rows, tokens).")
    ] = None,
    jsonl: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a JSON line for each row.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For the text; by default data.tokenizer of the config."),
    ] = None,
) -> None:
    """The exact rows that steps of a run train on: ids, text, source, documents and offsets.

    --steps A:B are steps A, A + 1, …, B - 1, counted from 0: B is exclusive. Step s is the update that leads from
    checkpoint s to checkpoint s + 1, so a checkpoint N has seen the rows of steps 0:N.
    Without --ids and --jsonl the JSON lines go to the screen; with one of them, a line a step with its rows_hash, the
    number that metrics.jsonl of the run has at step s + 1.

    Example:

      castalia data view runs/demo/config.yaml --steps 0:2 --ids batches.npy --jsonl rows.jsonl
    """
    from castalia.analysis.viewing import parse_steps, records, save_ids, step_hash
    from castalia.core.files import atomic_write
    from castalia.data import load_tokenizer

    config, rows = rows_of(sources)
    chosen = parse_steps(steps, config.train.batch_size, config.train.steps)
    named = tokenizer or config.data.tokenizer
    texts = (
        json.dumps(r, ensure_ascii=False)
        for r in records(rows, chosen, load_tokenizer(named) if named else None)
    )
    if ids:
        save_ids(rows.train, chosen, ids)
    if jsonl:
        with atomic_write(jsonl) as file:
            file.writelines(text + "\n" for text in texts)
    for step in range(chosen.first, chosen.stop) if ids or jsonl else []:
        hashed = step_hash(rows.train, step, chosen.batch_size)
        typer.echo(f"step {step}: {chosen.batch_size:,} rows, rows_hash {hashed}")
    for text in texts if not (ids or jsonl) else []:
        typer.echo(text)


@app.command()
def materialize(
    sources: Sources,
    steps: StepRange,
    output: Annotated[
        str, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json.")
    ],
    as_json: AsJson = False,
) -> None:
    """Write the exact rows of a run's steps, in order, as a token file: one item a row of data.seq_length + 1 tokens.

    --steps A:B are steps A to B - 1, counted from 0; `:` is the whole run. Item i is row i mod B of step A + i // B,
    B = train.batch_size: the form of Pythia's preshuffled files. `castalia train … data.train=PREFIX data.order=file`
    takes them in this order.
    """
    from castalia.analysis.viewing import parse_steps
    from castalia.data.ready_rows import common_dtype, write_rows

    config, rows = rows_of(sources)
    chosen = parse_steps(steps, config.train.batch_size, config.train.steps)
    facts = {
        "rows_of": {
            "first_step": chosen.first,
            "stop_step": chosen.stop,
            "batch_size": chosen.batch_size,
        },
        "seq_length": rows.train.seq_length,
        "fingerprint": rows.fingerprint,
    }
    places = chosen.places
    size = (
        len(places)
        * (rows.train.seq_length + 1)
        * common_dtype([p.dataset for p in rows.train.row_sources]).itemsize
    )
    with bar("materialize", [], size) as on_bytes:
        record = write_rows(rows.train, places.start, places.stop, output, facts, on_bytes)
    typer.echo(json.dumps(record) if as_json else line(Path(output).parent, record))


def rows_of(sources: list[str]) -> "tuple[RunConfig, RunRows]":
    """The config that the sources give, and the rows of its run as training builds them, or as its record has them."""
    from castalia.data import build_rows
    from castalia.data.rows_by_source import RowsBySource
    from castalia.demo.corpus import ensure_corpus
    from castalia.recipes import resolve
    from castalia.train.mixture import RecordedOrder

    config = ensure_corpus(resolve(sources).config, say=lambda text: typer.echo(text, err=True))
    train = config.train
    rows = build_rows(
        config.data,
        seed=config.seed,
        batch_size=train.batch_size,
        steps=train.steps,
        eval_every=None,
        eval_batches=train.eval_batches,
        planned=config.mixing.plans,
        allow_empty=config.mixing.allow_empty,
    )
    if isinstance(rows.train, RowsBySource):
        rows.train.order = RecordedOrder(config, rows, Path(config.output) / "mixture.jsonl")
    return config, rows


def line(folder: Path, record: dict[str, Any]) -> str:
    """One written token file for the screen."""
    counts = f"{record['documents']:,} documents, {record['tokens']:,} tokens as {record['dtype']}"
    return f"{folder / record['prefix']}: {counts}"


@contextmanager
def bar(
    verb: str, prefixes: list[str], size: int | None = None
) -> Iterator[Callable[[int], None] | None]:
    """A bar over the bytes of token files, or over `size` bytes, on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from castalia.core.errors import DataError
    from castalia.data import IndexedDataset

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    try:
        total = size or sum(len(IndexedDataset(prefix).buffer) for prefix in prefixes)
    except DataError:  # whoever asked for the bar says what is wrong
        total = None
    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as shown:
        task = shown.add_task(verb, total=total)
        yield lambda done: shown.advance(task, done)
