"""`castalia data …`: inspect, verify, cut, join, merge and split token files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.command import Verbs
from castalia.terminal.flags import AsJson, Overwrite, TokenizerFile

if TYPE_CHECKING:
    from castalia.curate.describe import Description
    from castalia.data import IndexedDataset

FILES = "Token files"
CLEANING = "Cleaning"
RUNS = "Rows of a run"

app = Verbs(
    help="Inspect, verify, cut, join and clean token files; show the rows that a run trains on.",
)

Prefix = Annotated[
    str,
    typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx, or shards of PREFIX.bin."),
]
Prefixes = Annotated[
    list[str], typer.Argument(metavar="PREFIX...", help="Token files, each whole or in shards.")
]
Output = Annotated[str, typer.Option(metavar="PREFIX", help="Write PREFIX.bin, .idx and .json.")]
Hashes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="SHA-256 by file name: Pythia's shard_hashes.txt, or sha256sum's output.",
    ),
]
SHARD_BYTES = 5_000_000_000
"""Pythia's; the same number as in castalia.data.shards, which help must not import."""


def print_record(output: str, record: dict[str, Any], as_json: bool) -> None:
    """Print the record of a written token file: as JSON, or in one line."""
    if as_json:
        typer.echo(json.dumps(record))
        return
    counts = f"{record['documents']:,} documents, {record['tokens']:,} tokens as {record['dtype']}"
    typer.echo(f"{Path(output).parent / record['prefix']}: {counts}")


@app.command(rich_help_panel=FILES)
def inspect(
    prefix: Prefix,
    document: Annotated[
        int | None,
        typer.Option(metavar="N", help="Show document N, counted from 0; -1 is the last."),
    ] = None,
    tokenizer: TokenizerFile = None,
    as_json: AsJson = False,
) -> None:
    """Show counts, lengths and dtype of a token file, and the text of one document.

    Example:

      castalia data inspect data/corpus --document 0 --tokenizer tokenizer.json
    """
    from castalia.curate.describe import describe
    from castalia.data import IndexedDataset

    dataset = IndexedDataset(prefix)
    # The document first: a wrong number should not cost a pass over the lengths of a large file.
    shown = None
    if document is not None:
        shown = one_document(dataset, document, tokenizer)
    facts = describe(dataset)
    if as_json:
        record = asdict(facts)
        if shown is not None:
            record["document"] = shown
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    print_facts(facts)
    if shown is not None:
        print_document(shown)


def one_document(dataset: "IndexedDataset", number: int, tokenizer: str | None) -> dict[str, Any]:
    """Number, length, ids or text, and origin of one document.

    Raises  ConfigError if the document does not exist or the tokenizer is another than the file's.
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
    document: dict[str, Any] = {"number": number % count, "tokens": len(ids)}
    if tokenizer is None:
        document["ids"] = ids
    else:
        decoder = load_tokenizer(tokenizer)
        require_tokenizer(str(dataset.prefix), decoder)
        document["text"] = decoder.decode(ids)
    origin = read_provenance(dataset.prefix, number % count)
    if origin is not None:
        document["from"] = origin
    return document


def print_document(document: dict[str, Any]) -> None:
    """One document: its number, its origin, then its text or its ids."""
    typer.echo(f"\ndocument {document['number']}, {document['tokens']:,} tokens")
    if "from" in document:
        typer.echo(origin_line(document["from"]))
    if "text" in document:
        typer.echo(document["text"])
    else:
        typer.echo(" ".join(str(number) for number in document["ids"]))


def origin_line(origin: dict[str, Any]) -> str:
    """The origin of a document: file and line, then the metadata that was kept."""
    place = origin["source"]
    if origin["member"]:
        place += f"({origin['member']})"
    words = [f"from {place}:{origin['line']} "]
    for name, value in origin.items():
        if value is not None and name not in ("source", "member", "line"):
            words.append(f"{name}={value}")
    return " ".join(words)


def print_facts(facts: "Description") -> None:
    """The facts as lines, then the lengths, with a bar for each power of two."""
    from castalia.monitor.display import size_text

    line = (
        f"{facts.prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens as {facts.dtype},"
        f" {size_text(facts.bytes)}"
    )
    if facts.shards:
        line += f" in {facts.shards} shards"
    typer.echo(line)
    typer.echo(
        f"tokens a document: least {facts.shortest:,}, mean {facts.mean:,.1f},"
        f" median {facts.median:,.1f}, most {facts.longest:,}; {facts.empty:,} empty"
    )
    if facts.maps:
        size = size_text(facts.maps_bytes)
        typer.echo(f"index maps: {facts.maps} files, {size} in {facts.prefix}.order")
    most = max((count for _, count in facts.histogram), default=1)
    for least, count in facts.histogram:
        # A bucket is the lengths of one power of two; the bar's 40 signs are the fullest one.
        label = "0" if least == 0 else f"{least:,}-{2 * least - 1:,}"
        typer.echo(f"{label:>27} {count:>13,} {'#' * -(-40 * count // most)}")


@app.command(rich_help_panel=FILES)
def count(prefixes: Prefixes, as_json: AsJson = False) -> None:
    """Count the documents and tokens of token files.

    Example:

      castalia data count data/a data/b
    """
    from castalia.data import IndexedDataset

    files: list[dict[str, Any]] = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        files.append(
            {
                "prefix": dataset.prefix,
                "documents": len(dataset),
                "tokens": int(dataset.sizes.sum(dtype="int64")),
                "dtype": dataset.dtype.name,
            }
        )
    sums = {name: sum(file[name] for file in files) for name in ("documents", "tokens")}
    if as_json:
        typer.echo(json.dumps({"files": files, **sums}))
        return
    for file in files:
        counts = f"{file['documents']:,} documents, {file['tokens']:,} tokens as {file['dtype']}"
        typer.echo(f"{file['prefix']}: {counts}")
    if len(files) > 1:
        typer.echo(f"all: {sums['documents']:,} documents, {sums['tokens']:,} tokens")


@app.command(rich_help_panel=FILES)
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
            metavar="BYTES",
            min=1,
            help="Size of listed shards, to check a whole .bin by a list of its shards.",
        ),
    ] = SHARD_BYTES,
    as_json: AsJson = False,
) -> None:
    """Check token files: structure, .json record, and hashes from the record and from a list.

    By default the list is PREFIX.sha256, if there is one. Any finding is a failure, also a file
    that the list names but the disk lacks, and a file of the prefix that the list lacks.

    Example:

      castalia data verify pile_0.87_deduped_text_document --hashes shard_hashes.txt
    """
    from castalia.core.errors import ConfigError, DataError
    from castalia.curate.verify import read_hashes
    from castalia.curate.verify import verify as checks
    from castalia.terminal.progress import bytes_progress

    # In one call a list could be written from files that its own check refuses.
    if hashes and write_hashes:
        raise ConfigError("give --hashes to check or --write-hashes to write, not both")
    listed = None
    if hashes:
        listed = read_hashes(hashes)
    with bytes_progress("verify", prefixes) as advance:
        results = list(checks(prefixes, listed, shard_bytes=shard_bytes, on_bytes=advance))
    for result in results:
        if as_json:
            typer.echo(json.dumps(asdict(result) | {"ok": result.ok}))
            continue
        verdict = "ok  " if result.ok else "FAIL"
        if result.note:
            verdict = "note"
        words = result.wrong or result.note or "right"
        typer.echo(f"{verdict} {result.about:9} {result.file}: {words}")
    failures = sum(not result.ok for result in results)
    if failures:
        raise DataError(f"{failures} of {len(results)} checks failed")
    if write_hashes:
        write_list(prefixes, write_hashes)


def write_list(prefixes: list[str], path: str) -> None:
    """Write the hashes of the prefixes' files, one a line."""
    from castalia.core.files import atomic_write
    from castalia.curate.verify import hash_list
    from castalia.terminal.progress import bytes_progress

    with bytes_progress("hash", prefixes) as advance, atomic_write(path) as file:
        for prefix in prefixes:
            for name, digest in hash_list(prefix, advance).items():
                file.write(f"{name} {digest}\n")


@app.command(rich_help_panel=FILES)
def shard(
    prefix: Prefix,
    output: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Folder of the shards; .idx and .json are copied."),
    ],
    size: Annotated[
        int,
        typer.Option("--bytes", metavar="BYTES", min=1, help="Size of each shard but the last."),
    ] = SHARD_BYTES,
) -> None:
    """Cut PREFIX.bin into shards named as Pythia's: BASE-00000-of-00082.bin.

    The second number is that of the last shard. Every verb reads shards in place, so they need not
    be joined again. The same command again keeps the shards that are right.

    Example:

      castalia data shard data/c --output shards --bytes 1000000000
    """
    from castalia.curate.resharding import shard as cut
    from castalia.terminal.progress import bytes_progress

    with bytes_progress("shard", [prefix]) as advance:
        written = cut(prefix, output, size=size, on_bytes=advance)
    typer.echo(
        f"{written[0]} to {written[-1].name}: {len(written)} shards of {size:,} bytes,"
        " the last may be shorter"
    )


@app.command(rich_help_panel=FILES)
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
    """Join the shards of PREFIX into one .bin.

    PREFIX may be the name of any one shard. Sizes are checked first, and hashes on the way if a
    list is given. After an interruption the same command continues; on a finished .bin it compares.

    Example:

      castalia data unshard shards/c --output data
    """
    from castalia.curate.resharding import unshard as join
    from castalia.curate.verify import read_hashes
    from castalia.terminal.progress import bytes_progress

    listed = None
    if hashes:
        listed = read_hashes(hashes)
    with bytes_progress("unshard", [prefix]) as advance:
        joined = join(prefix, output, hashes=listed, on_bytes=advance)
    if as_json:
        typer.echo(json.dumps(asdict(joined) | {"path": str(joined.path)}))
        return
    line = f"{joined.path}: {joined.shards} shards, {joined.bytes:,} bytes"
    if joined.kept:
        line += f", {joined.kept:,} of them from before"
    typer.echo(f"{line}, SHA-256 {joined.sha256}")


@app.command(rich_help_panel=FILES)
def merge(
    prefixes: Prefixes, output: Output, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Merge token files of one dtype into one, documents in the order of the inputs.

    Example:

      castalia data merge data/a data/b --output data/both
    """
    from castalia.curate.joining import merge as join
    from castalia.terminal.progress import bytes_progress

    with bytes_progress("merge", prefixes) as advance:
        record = join(prefixes, output, overwrite=overwrite, on_bytes=advance)
    print_record(output, record, as_json)


@app.command(rich_help_panel=FILES)
def split(
    prefix: Prefix,
    output: Annotated[
        str,
        typer.Option(
            metavar="PREFIX", help="Write PREFIX-train, -valid, -test, or PREFIX-part0 and so on."
        ),
    ],
    shares: Annotated[
        str | None,
        typer.Option(help="Shares of train, valid and test as in data.split: '969, 30, 1'."),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(metavar="N", help="Split into N parts of nearly as many documents each."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Split a token file into several, by whole documents in their order.

    --shares cuts exactly where data.split does, by GPT-NeoX's rule. A share without documents
    writes nothing.

    Example:

      castalia data split data/c --shares '969, 30, 1' --output data/c
    """
    from castalia.curate.joining import split as divide
    from castalia.terminal.progress import bytes_progress

    with bytes_progress("split", [prefix]) as advance:
        records = divide(
            prefix, output, shares=shares, parts=parts, overwrite=overwrite, on_bytes=advance
        )
    for record in records:
        print_record(output, record, as_json)
