"""The work folder of a job: finished parts, appended to the outputs in order, each exactly once.

An interrupted job continues from here.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from castalia.core.errors import ConfigError
from castalia.core.files import cannot_write, write_json
from castalia.core.hashed_file import HashedFile
from castalia.core.sealed import Seal
from castalia.corpus import provenance
from castalia.corpus.documents import Fault, fault_sentence
from castalia.corpus.forms import TOKENS
from castalia.corpus.job import PrepareJob
from castalia.corpus.open_files import append_file, locked, opened, read_chunks
from castalia.corpus.part_files import (
    RECORD,
    REJECTS_OF_PART,
    PartRecord,
    part_file,
    read_part_record,
)
from castalia.corpus.parts import JobPart
from castalia.data.indexed import give_names, write_index
from castalia.data.seals import entries_of, entry, sealed

REJECTS_OF_JOB = "whole.rejects.jsonl"
MOMENT = "moment"
"""File with the time that chat templates of the job are told."""
MOST_UNFLUSHED = 8
"""Parts that may wait for the disk while later ones are appended; each still takes double space."""


class ExtentPlace(NamedTuple):
    """Where the documents of one extent came from."""

    file: int
    path: str
    member: str | None
    lines_before: int
    """Lines or rows of the file before the extent."""


class WorkFolder:
    """PREFIX.parts, locked while it is open.

    `whole.I.bin` is output I so far. A part's tokens are appended to it, a thread flushes the file,
    and then the part's own .bin is removed: so all tokens but a few parts' are on disk once. After
    a crash, only what matches its checksum is trusted.
    """

    def __init__(self, job: PrepareJob, prefixes: Sequence[str]) -> None:
        """Lock the folder and recover the parts of an earlier run.

        Raises  ConfigError if another process has the lock; CastaliaError if it cannot be written.
        """
        self.job = job
        self.prefixes = list(prefixes)
        self.folder = Path(job.folder)
        self.outputs = job.outputs
        self.done: list[PartRecord] = []
        """Records of the parts appended by this run, or taken over."""
        self.places: list[list[ExtentPlace]] = []
        """The extents of each of these parts."""
        self.last_file: tuple[int, str | None] | None = None
        self.lines_in_file = 0
        try:
            self.lock = locked(self.folder)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing {job.output}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            raise cannot_write(Path(job.output + ".bin"), error) from error
        if job.form.moment is not None:
            (self.folder / MOMENT).write_text(job.form.moment, encoding="utf-8")
        for path in self.folder.glob(".*.tmp"):  # of workers that were killed
            path.unlink(missing_ok=True)
        self.wholes = [opened(self.whole(i)) for i in range(len(self.prefixes))]
        self.disk = ThreadPoolExecutor(1)
        self.flushes: deque[Future[None]] = deque()
        self.recover()

    def whole(self, output: int) -> Path:
        """The growing .bin of one output."""
        return self.folder / f"whole.{output}.bin"

    def recover(self) -> None:
        """Count the parts, from the first on, whose tokens are in the outputs as recorded."""
        self.digests = [hashlib.sha256() for _ in self.prefixes]
        self.appended: list[PartRecord] = []
        """Parts whose tokens are in the outputs."""
        self.ends: list[list[int]] = [[0] * len(self.prefixes)]
        """Size of each output after 0, 1, 2, … parts."""
        for whole in self.wholes:
            whole.seek(0)
        while True:
            record = read_part_record(self.folder, len(self.appended), len(self.prefixes))
            if record is None or not self.follows(record):
                break
            self.appended.append(record)
            sizes = zip(self.ends[-1], self.sizes(record), strict=True)
            self.ends.append([end + size for end, size in sizes])
        self.truncate(len(self.appended))

    def sizes(self, record: PartRecord) -> list[int]:
        """Bytes that a part adds to each output."""
        counts = zip(record.outputs, self.outputs, strict=True)
        return [count["tokens"] * output.dtype.itemsize for count, output in counts]

    def follows(self, record: PartRecord) -> bool:
        """Whether the next bytes of every output are this part's; if so, they enter the digests."""
        digests = []
        outputs = zip(self.wholes, self.digests, self.sizes(record), record.outputs, strict=True)
        for whole, digest, size, recorded in outputs:
            extended = digest.copy()
            checksum = 0
            for chunk in read_chunks(whole, size):
                extended.update(chunk)
                checksum = crc32(chunk, checksum)
            if checksum != recorded["crc32"]:
                return False
            digests.append(extended)
        self.digests = digests
        return True

    def truncate(self, count: int) -> None:
        """Cut the outputs after the first `count` parts."""
        for whole, end in zip(self.wholes, self.ends[count], strict=True):
            whole.truncate(end)
            whole.seek(end)

    def reusable(self, part: JobPart) -> PartRecord | None:
        """The record of a part that an earlier run finished and that is unchanged; None otherwise.

        Parts must be asked for in order.
        """
        record = read_part_record(self.folder, part.number, len(self.prefixes))
        if record is not None and self.can_reuse(part, record):
            return record
        # Inputs or settings changed from this part on: later ones are stale as well.
        self.forget(part.number)
        return None

    def can_reuse(self, part: JobPart, record: PartRecord) -> bool:
        """Whether a recorded part is unchanged, and its tokens exist."""
        if record.identity != part.identity:
            return False
        # A part cut short by --num-docs is the last of its job: encoded again, never trusted.
        if part.most_documents is not None:
            return False
        return part.number < len(self.appended) or self.has_files(record)

    def forget(self, first: int) -> None:
        """Remove parts from `first` on, which an earlier job left, from the outputs."""
        if first >= len(self.appended):
            return
        self.truncate(first)
        for path in self.folder.glob(f"*.{RECORD}"):
            if int(path.name.split(".")[0]) >= first:
                path.unlink()
        self.recover()

    def has_files(self, record: PartRecord) -> bool:
        """Whether a part's own tokens exist with the right checksums."""
        for i, recorded in enumerate(record.outputs):
            tokens = part_file(self.folder, record.number, f"{i}.bin")
            if not tokens.is_file():
                return False
            checksum = 0
            with open(tokens, "rb") as file:
                for chunk in read_chunks(file, tokens.stat().st_size):
                    checksum = crc32(chunk, checksum)
            if checksum != recorded["crc32"]:
                return False
        return True

    def append(self, part: JobPart, record: PartRecord) -> str | None:
        """Take over the next part; returns the sentence of the fault that ends the job, if any.

        Raises  CastaliaError if the disk is full.
        """
        places = self.places_of(part, record)
        if record.failed is not None:
            extent, fault = record.failed
            return fault_sentence(part.extents[extent], Fault(*fault), places[extent].lines_before)
        if part.number >= len(self.appended):
            try:
                self.take(record)
            except OSError as error:
                raise cannot_write(Path(self.job.output + ".bin"), error) from error
        self.done.append(record)
        self.places.append(places)
        return None

    def places_of(self, part: JobPart, record: PartRecord) -> list[ExtentPlace]:
        """The places of the next part's extents; lines count through all extents of a file."""
        places = []
        for extent, lines in zip(part.extents, record.lines, strict=True):
            if self.last_file != (extent.file, extent.member):
                self.last_file = (extent.file, extent.member)
                self.lines_in_file = extent.before
            place = ExtentPlace(extent.file, extent.path, extent.member, self.lines_in_file)
            places.append(place)
            self.lines_in_file += lines
        return places

    def take(self, record: PartRecord) -> None:
        """Append a part's tokens to the outputs; its own files are removed once these are safe."""
        for i, whole in enumerate(self.wholes):
            with open(part_file(self.folder, record.number, f"{i}.bin"), "rb") as file:
                append_file(file, whole, self.digests[i])
        self.flushes.append(self.disk.submit(self.flush, record.number))
        self.wait(MOST_UNFLUSHED)

    def flush(self, number: int) -> None:
        """On the thread: flush the outputs to disk, then remove a part's own tokens."""
        for whole in self.wholes:
            os.fsync(whole.fileno())
        for i in range(len(self.wholes)):
            part_file(self.folder, number, f"{i}.bin").unlink()

    def wait(self, most: int) -> None:
        """Wait until at most `most` parts are unflushed; a flush's exception is raised here."""
        while self.flushes and (len(self.flushes) > most or self.flushes[0].done()):
            self.flushes.popleft().result()

    def finish(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the .idx, the document index and the .json of each output, and the rejects; then
        rename all files.

        `records` are the contents of the .json files, which are sealed here.
        """
        written: list[tuple[Path, Path]] = []
        try:
            self.wait(0)
            rejects = self.write_rejects()
            rejected = Path(self.job.output + provenance.REJECTS)
            for i, (prefix, record) in enumerate(zip(self.prefixes, records, strict=True)):
                tokens = entry(Seal(self.digests[i].hexdigest(), self.wholes[i].tell()))
                files = {".bin": tokens, ".idx": self.write_idx(i)}
                if self.job.documents and self.outputs[i].kind == TOKENS:
                    with HashedFile(self.folder / f"whole.{i}{provenance.SUFFIX}") as file:
                        names = self.job.wanted.metadata_names
                        provenance.write_index(file, self.index_tables(i), names)
                        files[provenance.SUFFIX] = entry(file.sync())
                path = self.folder / f"whole.{i}.json"
                written += [
                    (self.folder / f"whole.{i}{suffix}", Path(prefix + suffix))
                    for suffix in (*files, ".json")
                ]
                if rejects:
                    # One file for all outputs, whose prefixes may be longer than its own.
                    own = prefix == self.job.output
                    files[provenance.REJECTS if own else rejected.name] = rejects
                files |= self.tokenizer_entry(prefix)
                write_json(path, sealed(record, files))
            if rejects:
                written.append((self.folder / REJECTS_OF_JOB, rejected))
            # Only now, when every file is complete: no reader ever sees a part of an output.
            give_names(written)
            if not rejects:
                rejected.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(Path(self.job.output + ".bin"), error) from error

    def tokenizer_entry(self, prefix: str) -> dict[str, Any]:
        """The entry of the tokenizer's file, if it lies beside the token file."""
        where = Path(self.job.tokenizer.where)
        if not where.is_file() or where.resolve().parent != Path(prefix).resolve().parent:
            return {}
        return entries_of(prefix, [where.name])

    def write_idx(self, output: int) -> dict[str, Any]:
        """Write the .idx of one output; returns its entry in the record."""
        documents = sum(record.outputs[output]["documents"] for record in self.done)
        with HashedFile(self.folder / f"whole.{output}.idx") as file:
            dtype = self.outputs[output].dtype
            write_index(file, dtype, documents, lambda: self.all_sizes(output))
            return entry(file.sync())

    def all_sizes(self, output: int) -> Iterator[Any]:
        """Tokens of each document, part by part."""
        for record in self.done:
            yield np.fromfile(part_file(self.folder, record.number, f"{output}.sizes"), "<i4")

    def index_tables(self, output: int) -> Iterator[Any]:
        """The entries of the document index, part by part."""
        for record, places in zip(self.done, self.places, strict=True):
            path = part_file(self.folder, record.number, f"{output}.parquet")
            sources = [(place.path, place.member) for place in places]
            yield provenance.placed(path, sources, [place.lines_before for place in places])

    def write_rejects(self) -> dict[str, Any] | None:
        """Write the rejected documents as JSON lines; returns their entry in the record.

        None, and no file, if none was rejected.
        """
        if not self.rejected:
            return None
        with HashedFile(self.folder / REJECTS_OF_JOB) as file:
            for reject in self.rejects():
                file.write(json.dumps(reject, ensure_ascii=False).encode() + b"\n")
            return entry(file.sync())

    def rejects(self, within: str = "") -> Iterator[dict[str, Any]]:
        """The rejected documents of all parts in order, those whose JSON contains `within`."""
        for record, places in zip(self.done, self.places, strict=True):
            for line in self.reject_lines(record):
                if within not in line:
                    continue
                reject = json.loads(line)
                place = places[reject.pop("extent")]
                if reject["line"] is not None:
                    reject["line"] += place.lines_before
                yield {"file": place.path, "member": place.member, **reject}

    def unread(self) -> list[str]:
        """Sentences about inputs that could not be read, or not to their end.

        The number of documents lost with them is unknown. A damaged file of columns reports each of
        its extents; the first counts.
        """
        sentences: dict[tuple[str, str | None], str] = {}
        for reject in self.rejects(within='"line": null'):
            sentences.setdefault((reject["file"], reject["member"]), reject["reason"])
        return list(sentences.values())

    def reject_lines(self, record: PartRecord) -> Sequence[str]:
        """The lines of a part's rejects file."""
        if not record.rejected:
            return []
        path = part_file(self.folder, record.number, REJECTS_OF_PART)
        return path.read_text(encoding="utf-8").splitlines()

    @property
    def documents(self) -> int:
        """Documents in the first output so far."""
        return sum(record.outputs[0]["documents"] for record in self.done)

    @property
    def rejected(self) -> int:
        """Rejected documents so far."""
        return sum(record.rejected for record in self.done)

    def filled(self) -> dict[int, int]:
        """Documents with text, by number of the input."""
        counts: dict[int, int] = {}
        for record, places in zip(self.done, self.places, strict=True):
            for place, filled in zip(places, record.filled, strict=True):
                counts[place.file] = counts.get(place.file, 0) + filled
        return counts

    def close(self, needless: bool) -> None:
        """Unlock the folder; remove it if it is `needless` or has no finished part."""
        self.disk.shutdown()
        for whole in self.wholes:
            whole.close()
        if needless or not any(self.folder.glob(f"*.{RECORD}")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()
