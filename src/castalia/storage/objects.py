"""`ObjectStore`: the objects below one URL, with retries, a throttle and hashes."""

import hashlib
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from castalia.core.background import Background
from castalia.core.errors import CastaliaError
from castalia.core.files import cannot_write
from castalia.core.sealed import Seal
from castalia.storage.faults import StorageError, fault_of
from castalia.storage.throttle import Throttle
from castalia.storage.urls import file_system, problem_of_url, protocol_of

T = TypeVar("T")
MIB = 1 << 20
LEAST_PART = 5 * MIB
"""S3 refuses smaller parts of a multipart upload but for the last."""
MOST_PARTS = 10_000
"""Parts of one upload; a limit of S3."""
FIRST_WAIT = 0.3
LONGEST_WAIT = 8.0
"""Seconds before the second attempt, twice as many before each further one, and their limit."""
FETCHES = 8
"""Ranges of an object fetched at the same time."""
RANGE_BYTES = 8 * MIB
"""Bytes of each."""
WRITE_BYTES = MIB
"""Bytes handed to an upload at a time, so that the throttle is smooth."""
TAGS = ("ETag", "etag", "md5Hash", "content_md5")
"""Names of the hash that a store has of an object, by protocol."""
TIMES = ("ino", "mtime", "created", "updated", "LastModified")
"""Facts that change with the content, where a store has no hash."""


class Transfer(NamedTuple):
    """How bytes are sent."""

    rate: float | None = None
    """Bytes a second; None as fast as it goes."""
    chunk: int = 64 * MIB
    """Bytes of a part of a multipart upload; a smaller file is sent in one piece."""
    retries: int = 4
    """Further attempts after one that failed for a passing reason."""


class Facts(NamedTuple):
    """What a store says of an object without reading it."""

    size: int
    """Bytes."""
    tag: str
    """Another content has another: the ETag, or the time of change."""


class ObjectStore:
    """The objects below a URL; their names are relative to it.

    url      `s3://bucket/prefix`, or any other of fsspec.
    stopped  an event that ends waits of throttle and retries early.
    Raises   StorageError, one sentence, from every method.
    """

    def __init__(
        self,
        url: str,
        transfer: Transfer = Transfer(),
        stopped: threading.Event | None = None,
    ) -> None:
        if problem := problem_of_url(url):
            raise StorageError(problem)
        self.url = url.rstrip("/")
        self.transfer = transfer
        self.throttle = Throttle(transfer.rate)
        self.stopped = stopped or threading.Event()
        self.opened: tuple[int, Any] | None = None
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    @property
    def system(self) -> Any:
        """The file system of fsspec, one in each process."""
        with self.lock:
            # A forked worker must not use the sockets of its parent.
            if self.opened is None or self.opened[0] != os.getpid():
                self.opened = (os.getpid(), file_system(protocol_of(self.url)))
            return self.opened[1]

    @property
    def is_local(self) -> bool:
        """Whether the objects are files of this machine."""
        return protocol_of(self.url) in ("file", "local")

    def url_of(self, name: str) -> str:
        """The URL of an object; that of the store for an empty name."""
        return f"{self.url}/{name}" if name else self.url

    def path_of(self, name: str) -> str:
        """The path of an object as fsspec has it."""
        path: str = self.system._strip_protocol(self.url_of(name))
        return path

    def attempt(self, doing: str, name: str, work: Callable[[], T]) -> T:
        """What `work` returns; repeated after passing errors, with growing pauses.

        Nothing new begins once `stopped` is set: who gave up has said what is not there.
        """
        if self.stopped.is_set():
            raise StorageError(f"cannot {doing} {self.url_of(name)}: uploads were ended")
        wait = FIRST_WAIT
        for left in range(self.transfer.retries, -1, -1):
            try:
                return work()
            except CastaliaError:
                raise
            except Exception as error:
                fault = fault_of(error, doing, self.url_of(name))
                if left == 0 or not fault.passing or self.stopped.is_set():
                    raise fault from error
            # Spread, so that many ranks do not come back in the same moment.
            self.stopped.wait(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    def read(self, name: str) -> bytes:
        """The content of an object."""
        content: bytes = self.attempt(
            "read", name, lambda: self.system.cat_file(self.path_of(name))
        )
        return content

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, which has as many."""

        def work() -> bytes:
            content: bytes = self.system.cat_file(self.path_of(name), start=start, end=stop)
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} bytes came of {stop - start}")
            return content

        return self.attempt("read", name, work)

    def facts(self, name: str) -> Facts:
        """Size and tag of an object.

        Raises  StorageError, `missing` if there is none.
        """

        def work() -> Facts:
            found = self.system.info(self.path_of(name))
            if found.get("type") == "directory":
                raise FileNotFoundError(name)
            return Facts(int(found["size"]), tag_of(found))

        return self.attempt("read", name, work)

    def sizes(self, under: str = "") -> dict[str, int]:
        """Name and bytes of every object below a folder; empty if there is none."""

        def work() -> dict[str, int]:
            root = self.path_of("")
            try:
                found = self.system.find(self.path_of(under), detail=True)
            except FileNotFoundError as error:
                # A bucket that does not exist is another matter than a folder.
                if fault_of(error, "read", self.url).missing:
                    return {}
                raise
            # A name with a slash at its end is an empty object that stands for a folder, as the
            # website of a bucket makes them.
            return {
                path[len(root) :].lstrip("/"): int(at["size"])
                for path, at in found.items()
                if not path.endswith("/")
            }

        return self.attempt("list", under, work)

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, at once or not at all."""
        self.throttle.take(len(content), self.stopped)

        def work() -> None:
            if self.is_local:
                self.write_local(name, [content])
            else:
                self.system.pipe_file(self.path_of(name), content)

        self.attempt("write", name, work)

    def write_local(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file of this machine, which has its name once it is whole."""
        path = Path(self.path_of(name))
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def send(self, path: Path, name: str, seal: Seal) -> None:
        """Send the first `seal.size` bytes of a local file, whose hash must be that of the seal.

        The object has its name once all of it is there. A file that differs is not sent.
        Raises  StorageError; CastaliaError if the local file is not what the seal says.
        """
        size = path.stat().st_size if seal.size is None else seal.size
        # At most so many parts, whatever the size of the file.
        chunk = max(self.transfer.chunk, LEAST_PART, -(-size // (MOST_PARTS - 1)))
        if size <= chunk:
            self.send_whole(path, name, seal, size)
        elif self.is_local:
            self.attempt(
                "write", name, lambda: self.write_local(name, Pieces(self, path, seal, size))
            )
        else:
            self.attempt("write", name, lambda: self.send_parts(path, name, seal, size, chunk))

    def send_whole(self, path: Path, name: str, seal: Seal, size: int) -> None:
        """Send a file of one part."""
        content = b"".join(Pieces(None, path, seal, size))
        self.write(name, content)

    def send_parts(self, path: Path, name: str, seal: Seal, size: int, chunk: int) -> None:
        """Send a file part by part; nothing is left of one that fails."""
        # Committed by hand: closing a file of fsspec after an error would keep half of it.
        file = self.system.open(self.path_of(name), "wb", block_size=chunk, autocommit=False)
        try:
            for piece in Pieces(self, path, seal, size):
                file.write(piece)
            file.close()
            file.commit()
        except BaseException:
            with suppress(Exception):  # the server is gone, and so is the upload
                file.discard()
            # Else the garbage collector would try to send it.
            file.closed = True
            raise

    def fetch(self, name: str, path: Path, size: int) -> None:
        """Fetch an object of `size` bytes into a local file, several ranges at a time.

        The file is not synced, and has its name from the beginning: callers rename it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                self.fetch_into(name, file.fileno(), size)
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from error

    def fetch_into(self, name: str, descriptor: int, size: int) -> None:
        """Fetch an object into an open file. Once this has returned or raised, nobody writes into
        the file: its number may be that of another one by then."""
        writing = threading.Lock()
        broken_off = threading.Event()

        def part(start: int) -> None:
            content = self.read_range(name, start, min(start + RANGE_BYTES, size))
            with writing:
                if not broken_off.is_set():
                    os.pwrite(descriptor, content, start)

        pool = Background(FETCHES, "fetches")
        parts = [pool.submit(part, start) for start in range(0, size, RANGE_BYTES)]
        try:
            for each in futures.wait(parts, return_when=futures.FIRST_EXCEPTION).done:
                each.result()
        except BaseException:
            # A Ctrl-C does not wait for a server that hangs, and the other ranges are not tried.
            for each in parts:
                each.cancel()
            with writing:
                broken_off.set()
            raise

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in this order; one that does not exist is deleted."""
        for name in names:

            def work(name: str = name) -> None:
                with suppress(FileNotFoundError):
                    self.system.rm_file(self.path_of(name))

            self.attempt("delete", name, work)


def tag_of(found: Mapping[str, Any]) -> str:
    """The tag of an object by what fsspec says of it."""
    hashes = [str(found[key]) for key in TAGS if found.get(key)]
    if hashes:
        return hashes[0].strip('"')
    return " ".join(str(found[key]) for key in TIMES if found.get(key) is not None)


class Pieces:
    """The bytes of a local file, throttled, a MiB at a time, hashed on the way.

    Raises  CastaliaError if the file cannot be read, and after the last piece if it is not what its
            seal says.
    """

    def __init__(self, store: ObjectStore | None, path: Path, seal: Seal, size: int) -> None:
        self.store = store
        self.path = path
        self.seal = seal
        self.size = size

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self.read()
        except OSError as error:
            # Else it would count as an error of the store, and be tried again for ever.
            raise CastaliaError(f"cannot read {self.path}: {error.strerror or error}") from error

    def read(self) -> Iterator[bytes]:
        """See the class."""
        digest = hashlib.sha256()
        left = self.size
        with open(self.path, "rb") as file:
            while left and (piece := file.read(min(WRITE_BYTES, left))):
                if self.store is not None:
                    self.store.throttle.take(len(piece), self.store.stopped)
                    if self.store.stopped.is_set():
                        raise StorageError(f"the upload of {self.path} was broken off")
                digest.update(piece)
                left -= len(piece)
                yield piece
        if left or digest.hexdigest() != self.seal.sha256:
            raise CastaliaError(
                f"{self.path} is not as it was written: its SHA-256 differs; it is not sent"
            )
