"""`castalia trace` and `castalia index`: where a text stands in the training stream."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson, grouped, note, panel

if TYPE_CHECKING:
    from castalia.data.indexed import IndexedDataset
    from castalia.stream.opening import Stream
    from castalia.stream.tracing import Trace

SEARCH = panel("Search")
ANSWER = panel("Answer")

IndexFolder = Annotated[
    str | None,
    SEARCH(metavar="FOLDER", help="Folder of the indexes, if not beside the token files."),
]
Workers = Annotated[
    int | None,
    SEARCH(metavar="N", min=1, help="Processes; by default one a core."),
]


@dataclass(frozen=True)
class SearchFlags:
    """What is looked for, and where."""

    ids: Annotated[str | None, SEARCH(metavar="5,6,7", help="Token ids in place of a text.")] = None
    exact_ids: Annotated[bool, SEARCH("--exact-ids", help="Not also the text behind a space.")] = (
        False
    )
    before: Annotated[
        int | None,
        SEARCH(metavar="STEP", help="Only steps 0 to STEP - 1, those checkpoint STEP has seen."),
    ] = None
    planned: Annotated[
        bool, SEARCH("--planned", help="Also steps that the run has not trained yet.")
    ] = False
    scan: Annotated[
        bool, SEARCH("--scan", help="Read the rows, not an index or the token files.")
    ] = False
    index_folder: IndexFolder = None
    workers: Workers = None


@dataclass(frozen=True)
class AnswerFlags:
    """What is printed."""

    limit: Annotated[int, ANSWER(metavar="N", min=0, help="Occurrences to show.")] = 20
    count_only: Annotated[
        bool, ANSWER("--count-only", help="Only how often, in all and by checkpoint.")
    ] = False
    next_ids: Annotated[
        int | None,
        ANSWER("--next", metavar="K", min=1, help="The K likeliest continuations instead."),
    ] = None


@grouped
def trace(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... TEXT",
            help="A run's folder, or the words of a config; then the text, but with --ids.",
        ),
    ],
    search: SearchFlags,
    answer: AnswerFlags,
    as_json: AsJson = False,
) -> None:
    """Find every place of a text in the training stream: step, row, document, offset, epoch.

    Step s leads from checkpoint s to s + 1, and row is the row within it. Without an index the
    token files are read; `castalia index` makes the answer immediate. --scan reads the rows as the
    steps did, which also finds texts that arise only there.

    --next counts what follows the text in the token files. If the text is not in them, its longest
    end that is (the infini-gram back-off).

    Examples:

      castalia trace runs/demo "It was the best of times"

      castalia trace runs/demo --ids 510,2904 --before 100 --json

      castalia trace runs/demo "7 times 8 is" --next 5
    """
    from castalia.stream.opening import open_stream
    from castalia.stream.tracing import trace as find

    run, text, ids = asked(words, search.ids)
    check_next(search, answer)
    stream = open_stream(run, note)
    if answer.next_ids is not None:
        show_next(stream, text, ids, answer.next_ids, search.index_folder, as_json)
        return
    found = find(
        stream,
        text,
        ids=ids,
        before=search.before,
        planned=search.planned,
        index_folder=search.index_folder,
        exact=search.exact_ids,
        rows=search.scan,
        workers=search.workers,
    )
    shown = repr(text) if text is not None else f"ids {search.ids}"
    show(found, shown, answer, as_json)


def asked(words: list[str], ids: str | None) -> tuple[list[str], str | None, list[int] | None]:
    """The words that name the run, and the text or the ids.

    Raises  ConfigError if one of them is missing or wrong.
    """
    from castalia.core.errors import ConfigError

    if ids is None:
        if len(words) < 2:
            raise ConfigError(
                f"castalia trace {words[0]}: expected a run and a text, such as `castalia trace"
                ' runs/demo "some text"`, or --ids'
            )
        return words[:-1], words[-1], None
    if len(words) > 1 and "=" not in words[-1] and not Path(words[-1]).exists():
        raise ConfigError(f"a text, {words[-1]!r}, and --ids {ids}: expected one of them")
    numbers = [word.strip() for word in ids.split(",")]
    if not all(word.isascii() and word.isdigit() for word in numbers):
        raise ConfigError(f"--ids {ids!r}: expected token ids such as 510,2904,13")
    return words, None, [int(word) for word in numbers]


def check_next(search: SearchFlags, answer: AnswerFlags) -> None:
    """Check that continuations are not asked of some steps: the token files have none.

    Raises  ConfigError.
    """
    from castalia.core.errors import ConfigError

    given = {
        "--before": search.before is not None,
        "--planned": search.planned,
        "--scan": search.scan,
        "--count-only": answer.count_only,
    }
    idle = [option for option, wanted in given.items() if wanted]
    if answer.next_ids is not None and idle:
        raise ConfigError(
            f"--next counts what follows a text in the token files, whatever steps read it; leave"
            f" out {' '.join(idle)}"
        )


def show(found: "Trace", shown: str, flags: AnswerFlags, as_json: bool) -> None:
    """Print a trace."""
    import sys

    from castalia.stream.trace_lines import checkpoint_lines, headline, trace_lines

    if as_json:
        for note in found.notes:
            typer.echo(note, err=True)
        answer: Any = list(found.records())
        if flags.count_only:
            answer = {
                "count": len(found),
                "split": found.split,
                "by_checkpoint": found.seen_before(),
            }
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    if flags.count_only:
        typer.echo("\n".join([headline(found, shown), *checkpoint_lines(found)]))
        return

    def mark(text: str) -> str:
        return typer.style(text, bold=True) if sys.stdout.isatty() else f"«{text}»"

    for line in trace_lines(found, shown, flags.limit, mark):
        typer.echo(line)


def show_next(
    stream: "Stream",
    text: str | None,
    ids: list[int] | None,
    most: int,
    index_folder: str | None,
    as_json: bool,
) -> None:
    """Print what follows a text in the token files."""
    from castalia.stream.following import continuations

    answer = continuations(stream, text, ids=ids, most=most, index_folder=index_folder)
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    context = answer["text"] if answer["text"] is not None else answer["ids"]
    noun = "continuation" if answer["count"] == 1 else "continuations"
    line = f"{context!r} has {answer['count']:,} {noun} in the token files"
    if answer["asked"] != len(answer["ids"]):
        line += f"; the whole text, of {answer['asked']} tokens, has none"
    typer.echo(line)
    for entry in answer["next"]:
        shown = entry["id"] if entry["text"] is None else repr(entry["text"])
        typer.echo(f"{entry['count']:>12,}  {entry['share']:6.1%}  {shown}")


def index(
    prefixes: Annotated[
        list[str], typer.Argument(metavar="PREFIX...", help="Token files, or a run's folder.")
    ],
    index_folder: IndexFolder = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index of other data.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare an index with its hashes; build nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Index token files: PREFIX.index beside PREFIX.bin, 4 bytes a token.

    The index is a suffix array in parts, which are sorted in parallel. It serves every run on
    these files, whatever its size, seed or order. After an interruption the same command continues.

    Example:

      castalia index data/corpus
    """
    from castalia.stream.index.files import token_files_of

    records = []
    for dataset in token_files_of(prefixes):
        if verify:
            record = verified(dataset, index_folder)
            line = f"{record['index']}: all {record['parts']} parts are as they were written"
        else:
            record = built(dataset, index_folder, workers, overwrite)
            parts = "part" if record["parts"] == 1 else "parts"
            line = f"{record['index']}: {record['tokens']:,} tokens in {record['parts']} {parts},"
            line += f" {record['bytes']:,} bytes; built {record['built']} in"
            line += f" {record['seconds']:.1f} s"
        records.append(record)
        if not as_json:
            typer.echo(line)
    if as_json:
        typer.echo(json.dumps(records))


def built(
    dataset: "IndexedDataset", folder: str | None, workers: int | None, overwrite: bool
) -> dict[str, Any]:
    """Build an index under a bar of progress; returns the record of the work."""
    from castalia.stream.index.building import build_index
    from castalia.terminal.progress import bytes_progress

    with bytes_progress("index", [dataset.prefix]) as advance:

        def on_tokens(tokens: int) -> None:
            if advance is not None:
                advance(tokens * dataset.dtype.itemsize)

        return build_index(
            dataset, folder, workers=workers, overwrite=overwrite, on_tokens=on_tokens
        )


def verified(dataset: "IndexedDataset", folder: str | None) -> dict[str, Any]:
    """Verify an index; returns what was verified.

    Raises  DataError if there is none, it is of other data, or damaged.
    """
    from castalia.stream.index.search import Index

    index = Index(dataset, folder)
    index.verify()
    return {
        "index": str(index.folder),
        "prefix": dataset.prefix,
        "tokens": len(index),
        "parts": index.layout.parts,
        "verified": True,
    }
