"""`castalia data dedup`, `contamination` and `mask`: documents to drop, tokens not to train on."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.data import CLEANING, Output, Prefix, Prefixes, app, print_record
from castalia.terminal.flags import AsJson, Overwrite

if TYPE_CHECKING:
    from castalia.curate.contamination import Findings


@app.command(rich_help_panel=CLEANING)
def dedup(
    prefixes: Prefixes,
    output: Annotated[
        str,
        typer.Option(metavar="PREFIX", help="Write PREFIX.bin, .idx, .json and .dropped.jsonl."),
    ],
    near: Annotated[
        float | None,
        typer.Option(metavar="J", help="Drop near-duplicates too: Jaccard index of n-grams >= J."),
    ] = None,
    ngram: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --near: tokens of an n-gram.")
    ] = 5,
    permutations: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="With --near: hash functions of a MinHash."),
    ] = 128,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Drop documents that repeat an earlier one; the first stays, in the order of the inputs.

    Equal documents are found by their hash. With --near, MinHash proposes candidates and their
    n-grams decide, so a document that overlaps by less than J always stays. PREFIX.dropped.jsonl
    names each dropped document and the one that it repeats.

    Example:

      castalia data dedup data/a data/b --output data/unique --near 0.8
    """
    from castalia.curate.dedup import Near
    from castalia.curate.dedup import dedup as remove
    from castalia.terminal.progress import bytes_progress

    rule = None
    if near is not None:
        rule = Near(near, ngram, permutations)
    with bytes_progress("dedup", prefixes) as advance:
        record = remove(prefixes, output, near=rule, overwrite=overwrite, on_bytes=advance)
    print_record(output, record, as_json)
    if not as_json:
        dropped = record["dedup"]["dropped"]
        typer.echo(
            f"dropped {dropped['equal']:,} equal and {dropped['near']:,} nearly equal documents"
        )


@app.command(rich_help_panel=CLEANING)
def contamination(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS...", help="Token files, or text as `prepare` reads it."),
    ],
    evaluations: Annotated[
        list[str],
        typer.Option(
            "--with", metavar="FILE", help="Evaluation documents: JSON lines or text; repeatable."
        ),
    ],
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a JSON line for each document.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="Tokenizer of the token files.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="JSON key of the evaluation text; several are joined. Default: text."),
    ] = None,
    corpus_key: Annotated[str, typer.Option(help="JSON key of the corpus's text.")] = "text",
    ngram: Annotated[int, typer.Option(metavar="N", min=1, help="Words of an n-gram.")] = 13,
    as_json: AsJson = False,
) -> None:
    """Find evaluation documents that overlap with a corpus.

    Documents are compared by n-grams of words, in lower case and without punctuation.

    Example:

      castalia data contamination data/c --tokenizer tok.json --with test.jsonl
    """
    from castalia.curate.contamination import contamination as compare
    from castalia.data import load_tokenizer
    from castalia.terminal.progress import bytes_progress

    decoder = None
    if tokenizer:
        decoder = load_tokenizer(tokenizer)
    with bytes_progress("contamination", corpus) as advance:
        overlaps = compare(
            corpus,
            evaluations,
            tokenizer=decoder,
            keys=key or ["text"],
            corpus_key=corpus_key,
            ngram=ngram,
            report=report,
            on_bytes=advance,
        )
    if as_json:
        typer.echo(json.dumps(asdict(overlaps)))
    else:
        print_overlaps(overlaps, ngram)


def print_overlaps(overlaps: "Findings", ngram: int) -> None:
    """Documents on both sides that share an n-gram, in two lines."""
    typer.echo(
        f"{overlaps.contaminated:,} of {overlaps.evaluations:,} evaluation documents share"
        f" {ngram} words in a row with the corpus; {overlaps.too_short:,} are shorter than that"
        " and were not checked"
    )
    typer.echo(
        f"{overlaps.overlapping:,} of {overlaps.documents:,} documents of the corpus have"
        " such words"
    )


@app.command(rich_help_panel=CLEANING)
def mask(
    prefix: Prefix,
    output: Output,
    before: Annotated[
        str, typer.Option(metavar="ID,ID,...", help="Token ids after which targets begin.")
    ],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the label file of a token file: -100 in each document up to the first --before.

    The tokens after it are targets. A document without these ids keeps all its targets.
    `data.labels=PREFIX` trains with the label file.

    Example:

      castalia data mask data/answers --before 37,25 --output data/answers_label
    """
    from castalia.core.errors import ConfigError
    from castalia.data.labels import mask_before
    from castalia.terminal.progress import bytes_progress

    try:
        pattern = [int(word) for word in before.split(",")]
    except ValueError:
        raise ConfigError(f"--before {before!r}: expected token ids such as 37,25") from None
    with bytes_progress("mask", [prefix]) as advance:
        record = mask_before(prefix, output, pattern, overwrite=overwrite, on_bytes=advance)
    print_record(output, record, as_json)
    if not as_json:
        typer.echo(f"{record['masked']:,} tokens are not targets")
