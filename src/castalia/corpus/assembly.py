"""Parts put together: appended to the outputs in their order as they come, each once, whatever interrupted the job."""

import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np

from castalia.core.errors import ConfigError
from castalia.core.files import CHUNK_BYTES, atomic_write, cannot_write, write_json
from castalia.corpus import provenance
from castalia.corpus.documents import Fault, sentence
from castalia.corpus.forms import TOKENS
from castalia.corpus.parts import Job, PartRecord, part_file, read_part_record
from castalia.corpus.pieces import Part
from castalia.data.indexed import give_names, write_index

BEHIND = 8
"""Parts that may wait for the disk while others are appended."""


class Assembly:
    """The work folder of a job, locked while it is open: `PREFIX.parts`.

    `whole.I.bin` is output I as far as it goes. A part is appended to each, a thread flushes these to the disk, then
    the part's own .bin goes; so every token is on disk once, but for a few parts. What a crash left is believed by its
    checksum only.
    """

    def __init__(self, job: Job, prefixes: Sequence[str]) -> None:
        self.job, self.prefixes, self.folder = job, list(prefixes), Path(job.folder)
        self.outputs = job.outputs
        self.done: list[PartRecord] = []
        self.pieces: list[list[list[Any]]] = []
        self.place: Any = None
        self.before = 0
        try:
            self.lock = locked(self.folder)
        except BlockingIOError:
            raise ConfigError(
                f"another process writes {job.output} now; wait for it or end it"
            ) from None
        except OSError as error:
            raise cannot_write(Path(job.output + ".bin"), error) from error
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        self.wholes = [opened(self.whole(i)) for i in range(len(self.prefixes))]
        self.disk, self.flushing = ThreadPoolExecutor(1), deque[Future[None]]()
        self.recover()

    def whole(self, output: int) -> Path:
        """The growing tokens of one output."""
        return self.folder / f"whole.{output}.bin"

    def recover(self) -> None:
        """Find how many parts, from the first on, stand in the wholes as their records say."""
        self.digests = [hashlib.sha256() for _ in self.prefixes]
        self.kept: list[PartRecord] = []
        self.ends: list[list[int]] = [[0] * len(self.prefixes)]
        for whole in self.wholes:
            whole.seek(0)
        while (
            record := read_part_record(self.folder, len(self.kept), len(self.prefixes))
        ) and self.stands(record):
            self.kept.append(record)
            self.ends.append(
                [end + size for end, size in zip(self.ends[-1], self.sizes(record), strict=True)]
            )
        self.cut(len(self.kept))

    def sizes(self, record: PartRecord) -> list[int]:
        """Bytes that a part adds to each output."""
        counts = zip(record.outputs, self.outputs, strict=True)
        return [count["tokens"] * output.dtype.itemsize for count, output in counts]

    def stands(self, record: PartRecord) -> bool:
        """Whether the next bytes of every whole are this part's; if so, they go into the digests."""
        found = []
        for whole, digest, size, output in zip(
            self.wholes, self.digests, self.sizes(record), record.outputs, strict=True
        ):
            joint, own = digest.copy(), 0
            for piece in read_bytes(whole, size):
                joint.update(piece)
                own = crc32(piece, own)
            found.append(joint)
            if own != output["crc32"]:
                return False
        self.digests = found
        return True

    def cut(self, count: int) -> None:
        """Keep the first `count` parts of the wholes."""
        for whole, end in zip(self.wholes, self.ends[count], strict=True):
            whole.truncate(end)
            whole.seek(end)

    def reusable(self, part: Part) -> PartRecord | None:
        """The record of a part that was done before and is the same now; parts must be asked for in their order."""
        record = read_part_record(self.folder, part.number, len(self.prefixes))
        same = record is not None and record.identity == part.identity and part.rows is None
        if record is not None and same and (part.number < len(self.kept) or self.has_files(record)):
            return record
        self.forget(part.number)  # the inputs or settings changed from here on
        return None

    def forget(self, first: int) -> None:
        """Parts from `first` on, which an earlier job left, go out of the wholes."""
        if first >= len(self.kept):
            return
        self.cut(first)
        for path in self.folder.glob("*.record.json"):
            if int(path.name.split(".")[0]) >= first:
                path.unlink()
        self.recover()

    def has_files(self, record: PartRecord) -> bool:
        """Whether a part's own tokens are there and their checksums right."""
        for i, output in enumerate(record.outputs):
            tokens, own = part_file(self.folder, record.number, f"{i}.bin"), 0
            if not tokens.is_file():
                return False
            with open(tokens, "rb") as file:
                for piece in read_bytes(file, tokens.stat().st_size):
                    own = crc32(piece, own)
            if own != output["crc32"]:
                return False
        return True

    def append(self, part: Part, record: PartRecord) -> str | None:
        """Take the next part in; returns the sentence of the fault that ends the job, if it has one.

        Raises  CastaliaError if the disk is full.
        """
        offsets = self.offsets(part, record)
        if record.failed is not None:
            piece, fault = record.failed
            return sentence(part.pieces[piece], Fault(*fault), offsets[piece])
        if part.number >= len(self.kept):
            try:
                self.take(record)
            except OSError as error:
                raise cannot_write(Path(self.job.output + ".bin"), error) from error
        self.done.append(record)
        self.pieces.append(
            [
                [p.file, p.path, p.member, p.form, n]
                for p, n in zip(part.pieces, offsets, strict=True)
            ]
        )
        return None

    def offsets(self, part: Part, record: PartRecord) -> list[int]:
        """Lines of the file that lie before each piece of the next part."""
        found = []
        for i, piece in enumerate(part.pieces):
            if self.place != (piece.file, piece.member):
                self.place, self.before = (piece.file, piece.member), piece.before
            found.append(self.before)
            self.before += record.lines[i]
        return found

    def take(self, record: PartRecord) -> None:
        """Append a part's tokens to the wholes; its own go when they are safe."""
        for i, whole in enumerate(self.wholes):
            with open(part_file(self.folder, record.number, f"{i}.bin"), "rb") as file:
                append_file(file, whole, self.digests[i])
        self.flushing.append(self.disk.submit(self.flush, record.number))
        self.wait(BEHIND)

    def flush(self, number: int) -> None:
        """On the thread: see the wholes onto the disk, and remove a part's own tokens."""
        for whole in self.wholes:
            os.fsync(whole.fileno())
        for i in range(len(self.wholes)):
            part_file(self.folder, number, f"{i}.bin").unlink()

    def wait(self, left: int) -> None:
        """Until at most so many parts wait for the disk; what went wrong with one is raised."""
        while self.flushing and (len(self.flushing) > left or self.flushing[0].done()):
            self.flushing.popleft().result()

    def finish(self, records: Sequence[dict[str, Any]]) -> None:
        """Write index, provenance and `records`, the .json of each output, and then give all files their names."""
        written: list[tuple[Path, str]] = []
        try:
            self.wait(0)
            for i, (prefix, record) in enumerate(zip(self.prefixes, records, strict=True)):
                written += [(self.whole(i), prefix + ".bin"), (self.write_idx(i), prefix + ".idx")]
                if self.job.documents and self.outputs[i].kind == TOKENS:
                    path = self.folder / f"whole.{i}.parquet"
                    with open(path, "wb") as file:
                        provenance.write_index(file, self.tables(i), self.job.wanted.kept)
                    written.append((path, prefix + provenance.SUFFIX))
                write_json(self.folder / f"whole.{i}.json", record)
                written.append((self.folder / f"whole.{i}.json", prefix + ".json"))
            give_names([(path, Path(name)) for path, name in written])
        except OSError as error:
            raise cannot_write(Path(self.job.output + ".bin"), error) from error

    def write_idx(self, output: int) -> Path:
        """The .idx of one output."""
        path, count = (
            self.folder / f"whole.{output}.idx",
            sum(r.outputs[output]["documents"] for r in self.done),
        )
        with open(path, "wb") as file:
            write_index(file, self.outputs[output].dtype, count, lambda: self.all_sizes(output))
            file.flush()
            os.fsync(file.fileno())
        return path

    def all_sizes(self, output: int) -> Iterator[Any]:
        """Tokens of each document, part by part."""
        for record in self.done:
            yield np.fromfile(part_file(self.folder, record.number, f"{output}.sizes"), "<i4")

    def tables(self, output: int) -> Iterator[Any]:
        """Documents of each part as rows of the index."""
        for record, pieces in zip(self.done, self.pieces, strict=True):
            sources = [(path, member) for _, path, member, _, _ in pieces]
            path = part_file(self.folder, record.number, f"{output}.parquet")
            yield provenance.placed(path, sources, [before for *_, before in pieces])

    def write_rejects(self, path: Path) -> int:
        """The rejected documents of all parts as JSON lines, none if there are none; returns how many."""
        count = sum(record.rejected for record in self.done)
        if not count:
            path.unlink(missing_ok=True)
            return 0
        with atomic_write(path) as file:
            for told in self.rejects():
                json.dump(told, file, ensure_ascii=False)
                file.write("\n")
        return count

    def rejects(self, within: str = "") -> Iterator[dict[str, Any]]:
        """The rejected documents of all parts in their order, those whose line holds `within`."""
        for record, pieces in zip(self.done, self.pieces, strict=True):
            for line in self.rejects_of(record):
                if within not in line:
                    continue
                told = json.loads(line)
                _, name, member, _, before = pieces[told.pop("piece")]
                if told["line"] is not None:
                    told["line"] += before
                yield {"file": name, "member": member, **told}

    def unread(self) -> list[str]:
        """What is wrong with inputs that could not be read, or not to their end: no one knows how much they held. A
        file of columns says it for each of its stretches; the first counts."""
        found: dict[tuple[str, str | None], str] = {}
        for told in self.rejects(within='"line": null'):
            found.setdefault((told["file"], told["member"]), told["reason"])
        return [*found.values()]

    def rejects_of(self, record: PartRecord) -> Sequence[str]:
        """The lines of a part's rejects."""
        if not record.rejected:
            return []
        return (
            part_file(self.folder, record.number, "rejects.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        )

    @property
    def documents(self) -> int:
        """Documents of the first output so far."""
        return sum(record.outputs[0]["documents"] for record in self.done)

    def filled(self) -> dict[int, int]:
        """Documents with text by the number of the input."""
        counts: dict[int, int] = {}
        for record, pieces in zip(self.done, self.pieces, strict=True):
            for (file, *_), filled in zip(pieces, record.filled, strict=True):
                counts[file] = counts.get(file, 0) + filled
        return counts

    def close(self, needless: bool) -> None:
        """Let go of the folder; remove it when nothing in it is needed again, or no part of it is done."""
        self.disk.shutdown()
        for whole in self.wholes:
            whole.close()
        if needless or not any(self.folder.glob("*.record.json")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()


def locked(folder: Path) -> IO[bytes]:
    """The lock of a work folder, held.

    Raises  BlockingIOError if another process holds it; OSError if the folder cannot be written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "wb")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same_file(lock, folder / "lock"):
                return lock
        except OSError:
            lock.close()
            raise
        lock.close()  # a job that ended has removed the folder meanwhile


def same_file(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def opened(path: Path) -> IO[bytes]:
    """A file to read and write, new if it is not there, without a buffer."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def read_bytes(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes, a few MiB at a time, fewer at the end of the file."""
    while size and (piece := file.read(min(size, CHUNK_BYTES))):
        size -= len(piece)
        yield piece


def append_file(source: IO[bytes], target: IO[bytes], digest: Any) -> None:
    """Append what is left of a file to another, which is not buffered."""
    while piece := memoryview(source.read(CHUNK_BYTES)):
        digest.update(piece)
        while piece:
            piece = piece[target.write(piece) :]
