"""Cached files that are executed: nobody else can write them, and each carries its SHA-256.

A folder may be shared, on a disk that loses power or flips bits. So the folder and its files are
opened once and checked through their descriptors: what was checked is what is read, whoever renames
or replaces the folders above meanwhile.
"""

import hashlib
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from castalia.core.files import cache_folder
from castalia.core.levels import instructions

NAME = re.compile(r"(?P<key>[0-9a-f]+)-(?P<sha256>[0-9a-f]{64})")
ABANDONED_SECONDS = 3600
"""Age of a temporary file whose writer was killed."""


class PrivateCache:
    """Files of this user alone, in `folder`, which is made if it is missing.

    A file is named by its key and its SHA-256, so that one rename stores both. Of several files for
    a key any whole one is right.
    Raises  PermissionError if it is a link, belongs to somebody else, or others may write to it;
            OSError if it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        if not hasattr(os, "geteuid"):  # Windows
            raise OSError(f"{folder}: this system does not tell whose a file is")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise PermissionError(f"{folder} is a link or a file; remove it")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        self.descriptor = os.open(folder, flags)
        fault = not_private(os.fstat(self.descriptor))
        if fault:
            os.close(self.descriptor)
            raise PermissionError(f"{folder} {fault}")

    def __enter__(self) -> "PrivateCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.descriptor)

    def read(self, key: str) -> bytes | None:
        """The content for a key; None if no file has it. Damaged and foreign ones are deleted."""
        for name in sorted(os.listdir(self.descriptor)):
            parts = NAME.fullmatch(name)
            if parts is None or parts["key"] != key:
                continue
            content = self.verified(name, parts["sha256"])
            if content is not None:
                return content
            with suppress(OSError):
                os.unlink(name, dir_fd=self.descriptor)
        return None

    def verified(self, name: str, sha256: str) -> bytes | None:
        """The content of a file; None if it is not this user's, or has another SHA-256."""
        # Without O_NONBLOCK a pipe in its place would wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except OSError:  # a link, or deleted since
            return None
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            # A second name may be in a folder of somebody else, who keeps the file by it.
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or not_private(facts):
                return None
            content = file.read()
        return content if hashlib.sha256(content).hexdigest() == sha256 else None

    def write(self, key: str, content: bytes) -> None:
        """Store the content for a key; file and folder are on the disk before this returns.

        Raises  OSError if the disk is full or read-only.
        """
        self.sweep()
        name = f"{key}-{hashlib.sha256(content).hexdigest()}"
        temporary = f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with open(os.open(temporary, flags, 0o600, dir_fd=self.descriptor), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            ends = {"src_dir_fd": self.descriptor, "dst_dir_fd": self.descriptor}
            os.rename(temporary, name, **ends)
            os.fsync(self.descriptor)
        finally:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self.descriptor)

    def sweep(self) -> None:
        """Delete what writers left that were killed."""
        for name in os.listdir(self.descriptor):
            if not name.endswith(".tmp"):
                continue
            with suppress(OSError):
                facts = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
                if time.time() - facts.st_mtime > ABANDONED_SECONDS:
                    os.unlink(name, dir_fd=self.descriptor)


def not_private(facts: os.stat_result) -> str | None:
    """Why others could have written a file or a folder, after its name; None if they could not."""
    if facts.st_uid != os.geteuid():
        return f"belongs to user {facts.st_uid}, not to {os.geteuid()}; remove it"
    if others_may_write(facts):
        return f"is writable by others (mode {stat.S_IMODE(facts.st_mode):o}); chmod go-w it"
    return None


def others_may_write(facts: os.stat_result) -> bool:
    """Whether the mode lets other users write."""
    if facts.st_mode & stat.S_IWOTH:
        return True
    return bool(facts.st_mode & stat.S_IWGRP) and not is_group_of_one(facts.st_gid)


def is_group_of_one(group: int) -> bool:
    """Whether a group is this user's alone, as Debian and others make one for each user."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        members = grp.getgrgid(group)
    except KeyError:  # a container without an entry for either
        return False
    own = group == user.pw_gid and members.gr_name == user.pw_name
    return own and set(members.gr_mem) <= {user.pw_name}


def keep_compiled_code_private() -> None:
    """Have torch.compile cache its code in this user's cache folder, where the environment names no
    other. Call it before compiling.

    torch's own choice is a fixed name in /tmp, which another user of the machine can make first;
    code in it runs. Each set of instructions has a folder of its own: torch 2.13 finds stored code
    by the graph without them, and loops that step by 8 numbers then store 16 at a time, beyond the
    end of a buffer. So it would be on nodes with one home, or with another ATEN_CPU_CAPABILITY.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") or not hasattr(os, "geteuid"):
        return
    folder = cache_folder().absolute() / "torch-compile"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        # torch opens it by its path, so the folders above matter as well.
        is_ours = not not_private(folder.lstat()) and not any(map(replaceable, above(folder)))
    except OSError:  # a read-only home, or none
        is_ours = False
    if not is_ours:
        # Another one in every process, each of which then compiles.
        folder = Path(tempfile.mkdtemp(prefix="castalia-compile-"))
    # Read by the processes that torch compiles in, too.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / instructions_key())


def instructions_key() -> str:
    """A name for what torch.compile's code on this processor may use."""
    words = [*sorted(instructions()), os.environ.get("ATEN_CPU_CAPABILITY", "")]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def above(folder: Path) -> Iterator[Path]:
    """The folders above one, as they are after following links."""
    place = folder.parent.resolve()
    yield place
    yield from place.parents


def replaceable(folder: Path) -> bool:
    """Whether another user than the administrator could replace what is in a folder."""
    facts = folder.stat()
    if facts.st_uid not in (0, os.geteuid()):
        return True
    # The sticky bit, as /tmp has it, keeps everybody from renaming what is another's.
    return others_may_write(facts) and not facts.st_mode & stat.S_ISVTX
