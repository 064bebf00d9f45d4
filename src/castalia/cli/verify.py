"""`castalia verify`: whether files are those that were written."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import AsJson

if TYPE_CHECKING:
    from castalia.integrity.checking import CheckedFolder

NAMED = 4
"""Files without a hash that a line names; --json has all."""

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Runs, checkpoints, exports, token files, folders of these, or mirrors.",
    ),
]


def verify(paths: Paths, as_json: AsJson = False) -> None:
    """Check that the files of folders are those that were written.

    Every file is read and compared with the SHA-256 that was recorded when it was written. Files
    for which no record has a hash are told. The exit status is 1 if a file is damaged or missing.

    Examples:

      castalia verify runs/debug

      castalia verify exports/ct2-int8 data/train --json

      castalia verify s3://bucket/runs/first
    """
    from castalia.integrity.checking import check_folders

    folders = []
    for folder in check_folders(paths):
        folders.append(folder)
        if not as_json:
            print_folder(folder)
    damaged = sum(len(folder.damaged) for folder in folders)
    if as_json:
        typer.echo(json.dumps([folder.as_dict() for folder in folders], indent=2))
    else:
        print_sum(folders, damaged)
    if damaged:
        raise typer.Exit(1)


def print_folder(folder: "CheckedFolder") -> None:
    """One line about a folder, and one for each fault."""
    text = f"{folder.path}: {folder.kind}, {counted(len(folder.files), 'file')}"
    uncovered = folder.uncovered
    if uncovered:
        names = [file.path.removeprefix(folder.path).lstrip("/") for file in uncovered[:NAMED]]
        more = ", ..." if len(uncovered) > NAMED else ""
        text += f", {len(uncovered)} not covered by a hash ({', '.join(names)}{more})"
    typer.echo(text)
    for file in folder.damaged:
        typer.echo(f"  damaged: {file.fault}")


def print_sum(folders: "list[CheckedFolder]", damaged: int) -> None:
    """The last line: how much was read, and what was found."""
    from castalia.monitor.display import size_text

    files = [file for folder in folders for file in folder.files]
    size = size_text(sum(file.size for file in files))
    verdict = "all whole"
    if damaged:
        verdict = f"{damaged} damaged"
    places = counted(len(folders), "folder")
    typer.echo(f"checked {counted(len(files), 'file')} in {places}, {size}: {verdict}")


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
