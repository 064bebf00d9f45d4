"""`castalia prepare`: text to token files."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.flags import grouped
from castalia.cli.forms import ChatFlags, FimFlags, split_names

if TYPE_CHECKING:
    from castalia.corpus import Prepared

INPUTS = (
    "Text files (one document each), JSON lines (.jsonl, .ndjson, .json), .tar or .zip of these, .gz, .zst or .xz of"
    " any of them; .parquet; .arrow; folders, also those of `datasets`; patterns such as 'part-*.jsonl.zst'; URLs;"
    " names of corpora, see --list."
)


Inputs = Annotated[list[str] | None, typer.Argument(metavar="INPUT...", help=INPUTS)]
TOKENIZERS = "A tokenizer.json, `bytes`, `char`, VOCAB.json,MERGES.txt, X.tiktoken or a SentencePiece X.model."
TokenizerFile = Annotated[str, typer.Option("--tokenizer", metavar="FILE", help=TOKENIZERS)]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        metavar="PREFIX",
        help="Writes PREFIX.bin, PREFIX.idx, PREFIX.json and the index.",
    ),
]
AppendEod = Annotated[
    bool,
    typer.Option(
        "--append-eod", help="End each document with the tokenizer's end-of-document token."
    ),
]
Keys = Annotated[
    list[str],
    typer.Option(
        "--key", help="Key or column of the text; several write PREFIX_KEY_document each."
    ),
]
Keep = Annotated[
    str,
    typer.Option(
        "--keep", metavar="A,B", help="Metadata to keep in PREFIX.documents.parquet, beside `id`."
    ),
]
NumDocs = Annotated[
    int | None, typer.Option("--num-docs", min=1, help="Read so many documents at most.")
]
OnError = Annotated[
    str,
    typer.Option(
        metavar="stop|reject", help="At a bad document stop, or write it to PREFIX.rejects.jsonl."
    ),
]
TrainVocab = Annotated[
    int | None,
    typer.Option(
        "--train-tokenizer",
        metavar="N",
        min=1,
        help="First train a BPE of N ids on INPUT and write it to --tokenizer.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        help="Processes that tokenize; 1 is this one. The output does not depend on it.",
    ),
]
Fast = Annotated[
    bool, typer.Option(help="Encode with gigatoken where its ids are those of tokenizers.")
]
Documents = Annotated[
    bool | None,
    typer.Option(help="Write where each document came from; by default if pyarrow is installed."),
]
ShareOf = Annotated[
    str,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only share I, from 0, of N; `castalia data merge` joins them.",
    ),
]
Engine = Annotated[
    str, typer.Option(metavar="local|ray", help="ray: on the machines of a Ray cluster.")
]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; none starts one here.")
]
Corpora = Annotated[
    str, typer.Option(metavar="FOLDER", help="Where corpora that are named are downloaded to.")
]
ListCorpora = Annotated[
    bool, typer.Option("--list", help="Print the corpora that can be named, and stop.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


@grouped
def prepare(
    chats: ChatFlags,
    fim: FimFlags,
    inputs: Inputs = None,
    tokenizer: TokenizerFile = "",
    output: Output = "",
    append_eod: AppendEod = False,
    key: Keys = ["text"],  # noqa: B006
    keep: Keep = "",
    ftfy: Annotated[
        bool, typer.Option("--ftfy", help="Mend broken Unicode with ftfy first.")
    ] = False,
    num_docs: NumDocs = None,
    on_error: OnError = "stop",
    train_tokenizer: TrainVocab = None,
    workers: Workers = 1,
    fast: Fast = True,
    documents: Documents = None,
    shard: ShareOf = "0/1",
    engine: Engine = "local",
    address: Address = None,
    corpora: Corpora = "corpora",
    list_corpora: ListCorpora = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize text into the memory-mapped .bin/.idx format of GPT-NeoX.

    Documents keep the order of the inputs; those without a token are left out and counted. Interrupted, the same
    command goes on where it was.
    """
    from castalia.cli.progress import text_progress
    from castalia.cli.signals import stoppable
    from castalia.corpus.corpora import resolve_inputs, table
    from castalia.corpus.prepare import Options
    from castalia.corpus.prepare import prepare as run

    if list_corpora:
        typer.echo(table())
        return
    require_words(INPUT=inputs, tokenizer=tokenizer, output=output)
    options = Options(
        append_eod=append_eod,
        keys=chats.keys(split_names(",".join(key))),
        keep=split_names(keep),
        ftfy=ftfy,
        rows=num_docs,
        reject=reject_of(on_error),
        fast=fast,
        documents=documents,
        workers=workers,
        shard=share_of(shard),
        engine=engine,
        address=address,
        chat=chats.options(),
        fim=fim.options(),
    )
    with stoppable("the same command goes on where it was"):
        with text_progress("download", []) as on_progress:
            files = resolve_inputs(inputs or [], corpora, lambda count: on_progress(count, 0))
        with text_progress("prepare", files) as on_progress:
            done = run(
                files,
                output,
                tokenizer,
                options,
                train_vocab=train_tokenizer,
                on_progress=on_progress,
            )
    print_summary(done, as_json)


def require_words(**words: object) -> None:
    """What is needed unless --list is given.

    Raises  ConfigError naming all that is missing.
    """
    from castalia.core.errors import ConfigError

    missing = [name if name.isupper() else f"--{name}" for name, word in words.items() if not word]
    if missing:
        raise ConfigError(
            f"castalia prepare needs {', '.join(missing)}; see castalia prepare --help"
        )


def reject_of(on_error: str) -> bool:
    """Whether bad documents are rejected.

    Raises  ConfigError about another word.
    """
    from castalia.core.errors import ConfigError

    if on_error not in ("stop", "reject"):
        raise ConfigError(f"--on-error {on_error}: expected stop or reject")
    return on_error == "reject"


def share_of(text: str) -> tuple[int, int]:
    """`i/n` as two numbers.

    Raises  ConfigError if it is not of that form.
    """
    from castalia.core.errors import ConfigError

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ConfigError(
            f"--shard {text}: expected I/N, such as 0/16, the first of sixteen shares"
        )
    return int(index), int(count)


def print_summary(done: "Prepared", as_json: bool) -> None:
    """What was written, in a line or as JSON."""
    from dataclasses import asdict

    from castalia.monitor.display import size_text

    if as_json:
        typer.echo(
            json.dumps(asdict(done) | {"megabytes_per_second": round(done.megabytes_per_second, 3)})
        )
        return
    notes = [f"{done.empty:,} empty left out"] * bool(done.empty)
    notes += [f"{done.rejected:,} rejected, see {done.prefix}.rejects.jsonl"] * bool(done.rejected)
    noted = f" ({'; '.join(notes)})" if notes else ""
    typer.echo(
        f"{', '.join(done.prefixes)}: {done.documents:,} documents{noted}, {done.tokens:,} tokens as {done.dtype},"
        f" {size_text(done.text_bytes)} of text in {done.seconds:.1f} s ({done.megabytes_per_second:.1f} MB/s)"
    )
