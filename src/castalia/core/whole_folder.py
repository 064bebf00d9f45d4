"""Folders that appear under their names whole: built in a workshop beside the place, synced, then
put there by one rename.

PARENT/.NAME.1a2b3c4d.tmp/         the workshop of one process, which holds the lock of .claim
PARENT/.NAME.1a2b3c4d.tmp/NAME     the new folder; after the exchange the earlier one
PARENT/.NAME.1a2b3c4d.tmp/.earlier where names cannot be exchanged: the earlier one, between renames
"""

import ctypes
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from castalia.core.files import CLAIM, lock_of, locked, on_disk, this_process

WORKSHOP = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp(?P<old>\.old)?")
"""Name of a workshop. `.old` ended the name of an earlier folder between the renames of versions
that had no workshops."""
EARLIER = ".earlier"
SILENT_SECONDS = 86400.0
"""A workshop without a lock that could tell is left behind once nothing was written for a day."""
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """An empty folder to be filled; when the block ends without an error, `place` names it.

    `place` is absolute. Whatever it names before is replaced and deleted. At every moment, also of
    a power cut, it names the earlier folder or the new one, whole. The one exception is a file
    system that cannot exchange two names: between two renames `place` names nothing, and
    `clear_workshops` puts the earlier folder back.
    """
    workshop = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    new = workshop / place.name
    try:
        new.mkdir(parents=True)
        # Locked before it has its name: whoever finds a claim finds it held.
        with open(workshop / f"{CLAIM}.new", "w", encoding="utf-8") as claim:
            locked(claim)
            claim.write(this_process())
            claim.flush()
            os.rename(claim.name, workshop / CLAIM)
            yield new
            put_in_place(new, place)
    finally:
        clear(workshop, place)


def put_in_place(new: Path, place: Path) -> None:
    """Give a finished folder of a workshop its name; an earlier one goes into the workshop."""
    # Contents reach the disk before the name does, else a power cut leaves empty files.
    sync_tree(new)
    if not os.path.lexists(place):
        new.rename(place)
    elif not exchanged(new, place):
        place.rename(new.with_name(EARLIER))
        # If this fails or is not reached, `clear` puts the earlier folder back.
        new.rename(place)
    # The new name as well, before the earlier folder is deleted.
    sync_folder(place.parent)


def exchanged(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system cannot.

    Source  rename(2) of Linux: renameat2 with RENAME_EXCHANGE, in glibc since 2.28.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    status = rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    # Whatever the reason, two plain renames come next, and their error is the one to report.
    return bool(status == 0)


def sync_tree(folder: Path) -> None:
    """Let every file of a folder, and the names in it, reach the disk."""
    for base, _, names in os.walk(folder, topdown=False):
        for name in names:
            on_disk(Path(base) / name)
        sync_folder(Path(base))


def sync_folder(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system syncs folders."""
    with suppress(OSError):
        on_disk(folder)


def clear_workshops(parent: Path) -> None:
    """Delete what killed processes left of `whole_folder` in `parent`, and put an earlier folder
    back whose name means nothing since.

    A workshop whose process runs is left alone.
    """
    try:
        items = sorted(parent.iterdir())
    except OSError:  # nothing was written there, or may be
        return
    for item in items:
        named = WORKSHOP.fullmatch(item.name)
        if named is None or item.is_symlink() or not item.is_dir():
            continue
        with held_if_left(item) as left:
            if left:
                clear(item, parent / named["name"])


def clear(workshop: Path, place: Path) -> None:
    """Delete a workshop; an earlier folder in it gets its name back if that means nothing."""
    earlier = workshop if workshop.name.endswith(".old") else workshop / EARLIER
    if earlier.is_dir() and not os.path.lexists(place):
        with suppress(OSError):
            earlier.rename(place)
            sync_folder(place.parent)
    shutil.rmtree(workshop, ignore_errors=True)


@contextmanager
def held_if_left(workshop: Path) -> Iterator[bool]:
    """Whether the process that built in a workshop has ended; if so, its lock is held in the
    block."""
    try:
        claim = (workshop / CLAIM).open("r+", encoding="utf-8")
    except OSError:
        # Killed before the claim, or of a version that had none.
        yield is_silent(workshop)
        return
    with claim:
        free = lock_of(claim)
        # Some file systems grant each host locks of its own, others none at all: there only time
        # tells.
        here = claim.read().endswith(f" on {platform.node()}")
        sure = free is True and here
        yield sure or (free is not False and is_silent(workshop))


def is_silent(workshop: Path) -> bool:
    """Whether nothing was written in a workshop for a day."""
    newest = 0.0
    with suppress(OSError):
        newest = workshop.stat().st_mtime
    for base, folders, names in os.walk(workshop):
        for name in (*folders, *names):
            with suppress(OSError):
                newest = max(newest, os.lstat(os.path.join(base, name)).st_mtime)
    return time.time() - newest > SILENT_SECONDS
