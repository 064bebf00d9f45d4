"""One save by one rank: its shards, then on rank 0 the manifest, COMPLETE and the final rename.

Ranks do not communicate: a save runs in the background, where a collective would mix with those of
training. Each rank leaves a note in the temporary folder, with its part of the manifest or the
reason of its failure, and rank 0 polls for the notes. A mark shared by all ranks tells the notes of
this save from those of one that was killed.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from castalia import __version__
from castalia.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    Chunk,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    TensorEntry,
    completion_mark,
    read_manifest,
    read_regular,
)
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.checkpoint.shards import write_bytes, write_shard
from castalia.checkpoint.stage import Staged
from castalia.checkpoint.tiling import fault_of_tiling
from castalia.config.base import Config
from castalia.core.errors import CheckpointError
from castalia.core.files import FULL, on_disk
from castalia.monitor.display import size_text

SHARD_BYTES = 4 << 30
"""A file is closed once it holds this many bytes; a larger tensor has a file to itself."""
LEAST_SHARD_BYTES = 64 << 20
"""Below this size a file is not worth a thread of its own."""
SHARDS = 8
"""About as many files hold the share of a rank that is smaller than that many of SHARD_BYTES."""
WRITERS = 4
"""Files hashed and written at the same time: while some wait for the disk, others use the cores."""
POLL_SECONDS = 0.02
"""Seconds between two looks for a file of another rank: short beside a save, long beside a stat."""
LARGEST_NOTE = 1 << 28
"""Bytes above which a note is refused unread; a note is a part of a manifest."""


class Note(Config):
    """A rank's message to rank 0; rank 0 leaves one only when it gives up."""

    save: str
    """Mark of the save."""
    failure: str | None = None
    """Why this rank gave up; null when all its files are on the disk."""
    tensors: dict[str, TensorEntry] = {}
    """Each tensor that this rank knows, with the chunks that it wrote."""
    files: dict[str, FileEntry] = {}
    """The files that it wrote."""


@dataclass
class RankSave:
    """One rank's share of a step, staged and ready to be written by `run`."""

    folder: Path
    step: int
    mark: str
    rank: int
    world: int
    staged: dict[str, Staged]
    texts: dict[str, bytes]
    patience: float
    relied_on: Callable[[], None] = lambda: None
    own_files: list[str] = field(default_factory=list)
    has_left: bool = False
    has_gathered: bool = False

    @property
    def temporary(self) -> Path:
        """The folder that the files grow in; its name is not one of a checkpoint."""
        return self.folder / f".{step_name(self.step)}.tmp"

    @property
    def final(self) -> Path:
        """The folder of the finished checkpoint."""
        return self.folder / step_name(self.step)

    def run(self) -> None:
        """Write, and return when the checkpoint exists. A failed save removes its files.

        Raises  CheckpointError, on every rank.
        """
        needed = sum(item.nbytes for item in self.staged.values())
        try:
            self.temporary.mkdir(parents=True, exist_ok=True)
            note = self.write_shards()
            if self.rank == 0:
                self.commit(self.gather(note))
            else:
                self.leave(note)
                self.wait_for_commit()
        except CheckpointError as error:
            self.give_up(str(error))
            raise
        except Exception as error:
            # Whatever the cause, the other ranks must learn of it instead of waiting for a note.
            reason = self.reason_of(error, needed)
            self.give_up(reason)
            raise CheckpointError(reason) from error

    def write_shards(self) -> Note:
        """Write this rank's files and force them to the disk."""
        tensors = {}
        # Every tensor is listed, also those written elsewhere: rank 0 finds disagreements by it.
        for name, item in self.staged.items():
            tensors[name] = TensorEntry(dtype=item.dtype, shape=item.shape, chunks=[])
        contents: dict[str, dict[str, Tensor]] = {}
        for file, items in self.files_of_groups():
            self.own_files.append(file)
            content = contents[file] = {}
            for name in items:
                for number, (box, tensor) in enumerate(self.staged[name].pieces):
                    key = name if number == 0 else f"{name}#{number}"
                    content[key] = tensor
                    tensors[name].chunks.append(
                        Chunk(file=file, key=key, offset=box.offset, shape=box.shape)
                    )
        return Note(save=self.mark, tensors=tensors, files=self.written(contents))

    def written(self, contents: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileEntry]:
        """Write files of tensors, several at a time; returns their entries."""
        # Leaving the block waits for every thread: after a failure nothing writes any more.
        with ThreadPoolExecutor(WRITERS) as pool:
            writes = {
                file: pool.submit(write_shard, self.temporary / file, content)
                for file, content in contents.items()
            }
            try:
                return {file: write.result() for file, write in writes.items()}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def files_of_groups(self) -> list[tuple[str, list[str]]]:
        """(file name, its tensors): a file a group (model, optim), and further ones when it is
        full.

        A file has one SHA-256, which one core computes. Several files keep several cores and the
        disk busy, also when they are read.
        """
        nbytes = sum(item.nbytes for item in self.staged.values())
        limit = min(SHARD_BYTES, max(LEAST_SHARD_BYTES, nbytes // SHARDS))
        groups: dict[str, list[list[str]]] = {}
        filled: dict[str, int] = {}
        for name, item in self.staged.items():
            group = name.partition(".")[0]
            if not item.pieces:
                continue  # another rank writes it, but the note still lists its shape
            parts = groups.setdefault(group, [[]])
            # A tensor is never split over files, so that every file can be read by itself.
            if parts[-1] and filled[group] + item.nbytes > limit:
                parts.append([])
                filled[group] = 0
            parts[-1].append(name)
            filled[group] = filled.get(group, 0) + item.nbytes
        out = []
        for group, parts in groups.items():
            for number, names in enumerate(parts):
                more = f"-{number}" if number else ""
                out.append((f"{group}-{self.rank:05d}{more}.safetensors", names))
        return out

    def note_path(self, rank: int) -> Path:
        """Path of a rank's note; rank 0's lies beside the temporary folder, which rank 0
        removes."""
        if rank == 0:
            return self.temporary.with_suffix(".failed")
        return self.temporary / f"rank-{rank:05d}.json"

    def leave(self, note: Note) -> None:
        """Write this rank's note by a rename, so that rank 0 never reads half of one."""
        path = self.note_path(self.rank)
        half = path.with_suffix(".half")
        write_bytes(half, note.model_dump_json().encode())
        os.replace(half, path)
        self.has_left = True

    def note_of(self, rank: int) -> Note | None:
        """The note of a rank; None until it has left one of this save."""
        try:
            note = Note.model_validate_json(read_regular(self.note_path(rank), LARGEST_NOTE))
        except (DamagedCheckpointError, ValidationError):
            return None
        if note.save != self.mark:
            return None  # left by a save that was killed
        return note

    def gather(self, own: Note) -> list[Note]:
        """All notes, by rank.

        Raises  CheckpointError if a rank gave up, or left no note within `patience` seconds.
        """
        notes = {0: own}

        def all_here() -> bool:
            for rank in range(1, self.world):
                if rank not in notes and (note := self.note_of(rank)):
                    notes[rank] = note
                    if note.failure:
                        raise CheckpointError(f"rank {rank} gave up: {note.failure}")
            return len(notes) == self.world

        if not wait_until(all_here, lambda: self.patience):
            missing = ", ".join(str(rank) for rank in range(self.world) if rank not in notes)
            raise CheckpointError(
                f"cannot save step {self.step} in {self.folder}: rank {missing} did not report"
                f" within {self.patience:g} s; check that it runs and shares this folder"
            )
        self.has_gathered = True
        return [notes[rank] for rank in range(self.world)]

    def commit(self, notes: list[Note]) -> None:
        """Write the texts, the manifest and COMPLETE, and rename the folder. Rank 0 only.

        The order is the promise: logs that the checkpoint relies on, files, manifest, COMPLETE,
        rename, each on the disk before the next begins. A power cut at any moment leaves the old
        checkpoints and, at most, a temporary folder.
        """
        self.relied_on()
        files = {name: entry for note in notes for name, entry in note.files.items()}
        for name, text in self.texts.items():
            self.own_files.append(name)
            files[name] = write_bytes(self.temporary / name, text)
        for item in list(self.temporary.iterdir()):
            if item.name not in files:  # a note, or left over from a save that was killed
                if item.is_dir():
                    shutil.rmtree(item)
                else:
                    item.unlink()
        manifest = Manifest(
            format=FORMAT,
            castalia=__version__,
            torch=str(torch.__version__),
            step=self.step,
            world=self.world,
            save=self.mark,
            tensors=merge(notes),
            files=files,
        )
        text = manifest.model_dump_json(indent=1).encode() + b"\n"
        write_bytes(self.temporary / MANIFEST, text)
        on_disk(self.temporary)
        write_bytes(self.temporary / COMPLETE, completion_mark(text))
        on_disk(self.temporary)
        if self.final.exists():
            # Incomplete or corrupt: a good one would have made this save unnecessary.
            discard(self.final)
        # The rename is the moment at which the checkpoint begins to exist.
        os.rename(self.temporary, self.final)
        on_disk(self.folder)

    def wait_for_commit(self) -> None:
        """Return when rank 0 has renamed the folder. Other ranks only.

        Raises  CheckpointError if rank 0 gave up, or did not finish within `patience` seconds.
        """

        def done() -> bool:
            if note := self.note_of(0):
                raise CheckpointError(f"rank 0 gave up: {note.failure}")
            try:
                # The mark, because a damaged checkpoint of this step may still stand there.
                return read_manifest(self.final).save == self.mark
            except DamagedCheckpointError:
                return False

        if not wait_until(done, lambda: self.patience):
            raise CheckpointError(
                f"rank 0 did not report on step {self.step} within {self.patience:g} s;"
                " check that it runs and shares this folder"
            )

    def give_up(self, reason: str) -> None:
        """Remove this rank's files and report the reason; rank 0 then removes the temporary
        folder."""
        # Once a note is left, rank 0 may commit or remove the folder at any moment.
        if not self.has_left:
            for name in self.own_files:
                (self.temporary / name).unlink(missing_ok=True)
            if self.world > 1:
                with suppress(
                    OSError
                ):  # on a full disk; the other ranks then run into their timeout
                    self.leave(Note(save=self.mark, failure=reason))
        if self.rank == 0:
            if not self.has_gathered:
                # A rank that still writes would make the folder again; give it a minute to report.
                everyone = range(1, self.world)
                wait_until(
                    lambda: all(self.note_of(rank) for rank in everyone),
                    lambda: min(self.patience, 60.0),
                )
            shutil.rmtree(self.temporary, ignore_errors=True)

    def reason_of(self, error: Exception, needed: int) -> str:
        """One sentence for the user about a failed write."""
        what = f"cannot save step {self.step} in {self.folder}"
        if not isinstance(error, OSError):
            return f"{what}: {type(error).__name__}: {error}"
        room = ""
        if error.errno in FULL:
            room = f" (rank {self.rank} needs {size_text(needed)} for it)"
        return (
            f"{what}: {error.strerror or error}{room}; earlier checkpoints are intact;"
            " free space or choose another output, then run the command again"
        )


def merge(notes: list[Note]) -> dict[str, TensorEntry]:
    """One table of tensors from the notes of all ranks.

    Raises  CheckpointError if ranks disagree on a tensor, or no rank wrote some part of it.
    """
    table: dict[str, TensorEntry] = {}
    for rank, note in enumerate(notes):
        for name, entry in note.tensors.items():
            known = table.setdefault(
                name, TensorEntry(dtype=entry.dtype, shape=entry.shape, chunks=[])
            )
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"rank {rank} has {name} in another shape or dtype than the ranks before it"
                )
            known.chunks.extend(entry.chunks)
    for name, entry in table.items():
        if fault := fault_of_tiling(entry.shape, [chunk.box for chunk in entry.chunks]):
            raise CheckpointError(
                f"cannot save {name}: the ranks do not hold the whole tensor: {fault}"
            )
    # Sorted, so that the manifest does not depend on which rank reported first.
    return dict(sorted(table.items()))


def discard(folder: Path) -> None:
    """Delete a folder by a rename first, so that under its name it is always whole or absent."""
    trash = folder.with_name(f".trash-{folder.name}-{time.time_ns():x}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: Callable[[], float]) -> bool:
    """Whether the condition came true in time; `seconds` is asked again, since it may shrink."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds():
            return False
        time.sleep(POLL_SECONDS)
    return True


def texts_of(state_text: str, files: Mapping[str, str]) -> dict[str, bytes]:
    """The small files of a checkpoint, as bytes, state.json among them."""
    return {STATE: state_text.encode(), **{name: text.encode() for name, text in files.items()}}
