"""`castalia prepare`: text to token files."""

import json
from typing import TYPE_CHECKING

import typer

from castalia.terminal.flags import grouped
from castalia.terminal.forms import (
    ChatFlags,
    ClusterFlags,
    FimFlags,
    InputFlags,
    Inputs,
    OutputFlags,
    TokenFlags,
    split_names,
)

if TYPE_CHECKING:
    from castalia.corpus import Prepared
    from castalia.corpus.options import PrepareOptions


@grouped
def prepare(
    inputs: Inputs = None,
    *,
    source: InputFlags,
    tokens: TokenFlags,
    files: OutputFlags,
    chats: ChatFlags,
    fim: FimFlags,
    cluster: ClusterFlags,
) -> None:
    """Tokenize text into the memory-mapped .bin/.idx format of GPT-NeoX.

    Documents keep the order of the inputs. Documents without a token are skipped and counted. After
    an interruption the same command continues.

    Examples:

      castalia prepare c.jsonl --tokenizer tok.json --append-eod --output data/c

      castalia prepare chats.jsonl --chat messages --tokenizer tok.json --output c
    """
    from castalia.corpus.named_corpora import resolve_inputs, table
    from castalia.corpus.prepare import prepare as run
    from castalia.terminal.progress import text_progress
    from castalia.terminal.signals import stoppable

    if source.list_corpora:
        typer.echo(table())
        return
    require_words(INPUT=inputs, tokenizer=tokens.tokenizer, output=files.output)
    options = options_of(source, tokens, files, chats, fim, cluster)
    with stoppable("the same command continues"):  # from the work in PREFIX.parts
        with text_progress("download", []) as advance:
            paths = resolve_inputs(inputs or [], source.corpora, lambda count: advance(count, 0))
        with text_progress("prepare", paths) as advance:
            prepared = run(
                paths,
                files.output,
                tokens.tokenizer,
                options,
                train_vocab=tokens.train_tokenizer,
                overwrite=files.overwrite,
                on_progress=advance,
            )
    print_summary(prepared, files.as_json)


def options_of(
    source: InputFlags,
    tokens: TokenFlags,
    files: OutputFlags,
    chats: ChatFlags,
    fim: FimFlags,
    cluster: ClusterFlags,
) -> "PrepareOptions":
    """The options as `castalia.prepare` takes them."""
    from castalia.corpus.options import PrepareOptions

    return PrepareOptions(
        append_eod=tokens.append_eod,
        eod=tokens.eod,
        keys=chats.keys(source.texts()),
        keep=split_names(files.keep),
        ftfy=source.ftfy,
        max_documents=source.num_docs,
        reject=source.rejects(),
        fast=tokens.fast,
        documents=files.documents,
        workers=cluster.workers,
        shard=cluster.share(),
        engine=cluster.engine,
        address=cluster.address,
        chat=chats.options(),
        fim=fim.options(),
    )


def require_words(**words: object) -> None:
    """Refuse a command without its inputs, tokenizer or output, which only --list can do without.

    Raises  ConfigError naming all that is missing.
    """
    from castalia.core.errors import ConfigError

    # Not typer's own check: --list needs none of these words.
    missing = []
    for name, word in words.items():
        if not word:
            missing.append(name if name.isupper() else f"--{name}")
    if missing:
        raise ConfigError(
            f"castalia prepare needs {', '.join(missing)}; see castalia prepare --help"
        )


def print_summary(prepared: "Prepared", as_json: bool) -> None:
    """The files written, their documents and tokens, and the speed: a line, or JSON."""
    from dataclasses import asdict

    from castalia.monitor.display import size_text

    if as_json:
        speed = round(prepared.megabytes_per_second, 3)
        typer.echo(json.dumps(asdict(prepared) | {"megabytes_per_second": speed}))
        return
    if prepared.done_before:
        typer.echo("an earlier run of the same command has finished; nothing was written")
    by = prepared.by
    # Parts that both encoded have a warning of their own.
    if prepared.fallback_reason and "gigatoken" not in by:
        by += f" ({prepared.fallback_reason})"
    notes = []
    if prepared.empty:
        notes.append(f"{prepared.empty:,} empty skipped")
    if prepared.rejected:
        notes.append(f"{prepared.rejected:,} rejected, see {prepared.prefix}.rejects.jsonl")
    documents = f"{prepared.documents:,} documents"
    if notes:
        documents += f" ({'; '.join(notes)})"
    typer.echo(
        f"{', '.join(prepared.prefixes)}: {documents}, {prepared.tokens:,} tokens as"
        f" {prepared.dtype}, {size_text(prepared.text_bytes)} of text in {prepared.seconds:.1f} s"
        f" ({size_text(prepared.megabytes_per_second * 1e6)}/s), encoded by {by}"
    )
