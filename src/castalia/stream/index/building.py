"""Building an index: parts in parallel processes, each of them atomic, the rest after a stop."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from castalia.core.errors import DataError
from castalia.core.extras import require
from castalia.core.files import claimed, read_json, write_json
from castalia.core.sealed import OWN_HASH, with_own_hash
from castalia.data.fingerprint import contents, source_changes
from castalia.data.indexed import IndexedDataset
from castalia.data.seals import require_own
from castalia.stream.index.flat import FlatTokens, width_of
from castalia.stream.index.parts import (
    PART_TOKENS,
    PURPOSE,
    Layout,
    build_part,
    is_whole,
)
from castalia.stream.processes import in_processes

SUFFIX = ".index"
"""Suffix of the folder beside a token file."""
MANIFEST = "index.json"
FORMAT = 2
WIDEST = 4
"""Most bytes of an id."""
MOST_BYTES = (1 << 31) - 1
"""Bytes that the sort takes at once: its places are int32."""

OnTokens = Callable[[int], Any]


@dataclass(frozen=True)
class Manifest:
    """What an index is of, and how it is cut."""

    layout: Layout
    end: int | None
    """The id that ends every document."""
    contents: dict[str, Any]
    """Sizes and hashes of the token file, as in fingerprints."""
    sealed: bool = False
    """Whether the file has its own hash, which older ones lack."""


def index_folder(prefix: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a token file's index: beside it, or in `folder`."""
    if folder is None:
        return Path(prefix + SUFFIX)
    return Path(folder) / (Path(prefix).name + SUFFIX)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None without one.

    Raises  DataError if it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise DataError(
                f"{path}: format {content['format']}, expected {FORMAT}; remove {folder} and build"
                " the index again"
            )
        require_own(path, path.read_text(), content, f"remove {folder} and build it again")
        layout = Layout(**content["layout"])
        return Manifest(layout, content["end"], dict(content["contents"]), OWN_HASH in content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not the manifest of an index ({error!r}); remove {folder} and build it again"
        ) from None


def require_same_data(folder: Path, manifest: Manifest, now: dict[str, Any]) -> None:
    """Refuse an index of other data.

    Raises  DataError naming the difference.
    """
    changes = source_changes(str(folder), manifest.contents, now)
    if changes:
        raise DataError(
            f"{changes[0]}: the index is of other data; build it again with `castalia index"
            " PREFIX --overwrite`, or name another --index-folder"
        )


def missing_parts(folder: Path, layout: Layout) -> list[int]:
    """The numbers of the parts that are not there yet."""
    return [number for number in range(layout.parts) if not is_whole(folder, layout, number)]


def build_index(
    dataset: IndexedDataset,
    folder: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    part_tokens: int = PART_TOKENS,
    overwrite: bool = False,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """Build the index of a token file, or what is missing of it; returns a record of the work.

    folder     for PREFIX.index, by default that of the token file.
    workers    processes, each of which sorts a part at a time; by default one a core.
    on_tokens  called with the tokens of each part that is done.
    Raises     DataError if the folder has an index of other data and `overwrite` is not set, or the
               ids are too large; ConfigError without pydivsufsort.
    """
    require("pydivsufsort", "trace", PURPOSE)
    place = index_folder(dataset.prefix, folder)
    start = time.perf_counter()
    # Who waits for another that builds finds the index there.
    with claimed(place, 3600.0, silent=1.0):
        manifest = prepared(dataset, place, part_tokens, overwrite)
        layout = manifest.layout
        missing = missing_parts(place, layout)
        if on_tokens:
            on_tokens(layout.tokens - sum(len(layout.span(number)) for number in missing))
        sort_parts(dataset, place, layout, missing, workers, on_tokens)
    return {
        "index": str(place),
        "prefix": dataset.prefix,
        "tokens": layout.tokens,
        "parts": layout.parts,
        "built": len(missing),
        "bytes": layout.bytes,
        "seconds": round(time.perf_counter() - start, 3),
    }


def prepared(dataset: IndexedDataset, folder: Path, part_tokens: int, overwrite: bool) -> Manifest:
    """The manifest of an index that is there, in whole or in part, or a new one."""
    now = contents(dataset)
    if overwrite:
        clear(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        # Its own size of parts holds: those that are there were cut by it.
        require_same_data(folder, manifest, now)
        return manifest
    flat = FlatTokens(dataset)
    survey = flat.survey()
    width = width_of(survey.largest)
    if width > WIDEST:
        raise DataError(
            f"{dataset.prefix}: holds token {survey.largest}, but an index takes ids below 2**32"
        )
    # A part is sorted with the overlap behind it, for which there must be room.
    layout = Layout(len(flat), width, min(part_tokens, MOST_BYTES // width - (1 << 20)))
    manifest = Manifest(layout, survey.end, now, sealed=True)
    require_room(folder, layout)
    facts = {"format": FORMAT, "layout": asdict(layout), "end": survey.end, "contents": now}
    write_json(folder / MANIFEST, with_own_hash(facts))
    return manifest


def require_room(folder: Path, layout: Layout) -> None:
    """Check for free space before the work.

    Raises  DataError if there is too little.
    """
    needed = layout.bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: an index of {layout.tokens:,} tokens needs {needed / 2**30:.1f} GiB, but"
            f" only {free / 2**30:.1f} GiB are free; choose another place with --index-folder"
        )


def clear(folder: Path) -> None:
    """Remove an index, its manifest first: parts without one are nobody's."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("part-*.places"):
        path.unlink()


def sort_parts(
    dataset: IndexedDataset,
    folder: Path,
    layout: Layout,
    missing: list[int],
    workers: int | None,
    on_tokens: OnTokens | None,
) -> None:
    """Sort the missing parts; a single one in this process."""
    for leftover in folder.glob(".part-*.tmp"):
        leftover.unlink()  # of a process that was killed
    processes = min(workers or os.cpu_count() or 1, len(missing))
    if processes == 1:
        processes = 0  # this one
    for tokens in in_processes((dataset, folder, layout), sort_one, missing, processes):
        if on_tokens:
            on_tokens(tokens)


def sort_one(what: tuple[IndexedDataset, Path, Layout], number: int) -> int:
    """One part of an index; returns its tokens."""
    return build_part(*what, number)
