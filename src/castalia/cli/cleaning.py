"""`castalia data dedup`, `contamination` and `mask`: what to leave out of a corpus, and what of it is no target."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from castalia.cli.data import AsJson, Prefix, Prefixes, app, bar, line


@app.command()
def dedup(
    prefixes: Prefixes,
    output: Annotated[
        str,
        typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, .idx, .json and .dropped.jsonl."),
    ],
    near: Annotated[
        float | None,
        typer.Option(metavar="J", help="Drop near-duplicates too: Jaccard index of n-grams >= J."),
    ] = None,
    ngram: Annotated[int, typer.Option(min=1, help="Tokens of an n-gram, for --near.")] = 5,
    permutations: Annotated[
        int, typer.Option(min=2, help="Hash functions of a MinHash signature, for --near.")
    ] = 128,
    as_json: AsJson = False,
) -> None:
    """Write documents without those that repeat an earlier one; the first stays, in the order of the inputs.

    Equal documents are found by their hash. With --near, MinHash finds candidates, and their n-grams decide:
    nothing goes that overlaps by less than J. PREFIX.dropped.jsonl names what went and what it repeats.

    Example:

      castalia data dedup data/a data/b --output data/unique --near 0.8
    """
    from castalia.curate.dedup import Near
    from castalia.curate.dedup import dedup as remove

    wanted = None if near is None else Near(near, ngram, permutations)
    with bar("dedup", prefixes) as on_bytes:
        record = remove(prefixes, output, near=wanted, on_bytes=on_bytes)
    if as_json:
        typer.echo(json.dumps(record))
        return
    dropped = record["dedup"]["dropped"]
    typer.echo(line(Path(output).parent, record))
    typer.echo(f"dropped {dropped['equal']:,} equal and {dropped['near']:,} nearly equal documents")


@app.command()
def contamination(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS...", help="Token files, or text as `prepare` reads."),
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
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="Of token files.")] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="JSON key of the evaluation text; several are joined. Default: text."),
    ] = None,
    corpus_key: Annotated[str, typer.Option(help="JSON key of the corpus's text.")] = "text",
    ngram: Annotated[int, typer.Option(min=1, help="Words of an n-gram.")] = 13,
    as_json: AsJson = False,
) -> None:
    """Overlaps of evaluation documents with a corpus: n-grams of words, lower case, no punctuation.

    Example:

      castalia data contamination data/corpus --tokenizer tokenizer.json --with test.jsonl --report overlap.jsonl
    """
    from castalia.curate.contamination import contamination as compare
    from castalia.data import load_tokenizer

    with bar("contamination", corpus) as on_bytes:
        found = compare(
            corpus,
            evaluations,
            tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
            keys=key or ["text"],
            corpus_key=corpus_key,
            ngram=ngram,
            report=report,
            on_bytes=on_bytes,
        )
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(
        f"{found.contaminated:,} of {found.evaluations:,} evaluation documents share {ngram} words in a row with the"
        f" corpus; {found.too_short:,} are shorter than that and were not checked"
    )
    typer.echo(
        f"{found.overlapping:,} of {found.documents:,} documents of the corpus hold such words"
    )


@app.command()
def mask(
    prefix: Prefix,
    output: Annotated[
        str, typer.Option(metavar="PREFIX", help="Label file to write: .bin, .idx and .json.")
    ],
    before: Annotated[
        str, typer.Option(metavar="ID,ID,...", help="Token ids after which targets begin.")
    ],
    as_json: AsJson = False,
) -> None:
    """Write the label file of a token file: -100 up to the end of the first --before in each document, then the tokens.

    A document without these ids keeps all its targets. `data.labels=PREFIX` trains with it.

    Example:

      castalia data mask data/answers --before 37,25 --output data/answers_label
    """
    from castalia.core.errors import ConfigError
    from castalia.data.labels import mask_before

    try:
        pattern = [int(word) for word in before.split(",")]
    except ValueError:
        raise ConfigError(f"--before {before!r}: expected token ids such as 37,25") from None
    with bar("mask", [prefix]) as on_bytes:
        record = mask_before(prefix, output, pattern, on_bytes=on_bytes)
    typer.echo(json.dumps(record) if as_json else line(Path(output).parent, record))
    if not as_json:
        typer.echo(f"{record['masked']:,} tokens are no target")
