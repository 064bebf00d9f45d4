"""The checkpoints of one run: save in the background, find the newest good one, delete old ones."""

import fcntl
import json
import os
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.checkpoint.find import complete_steps, ranges_of
from castalia.checkpoint.load import Ready, load_into, make_ready, verify
from castalia.checkpoint.manifest import (
    COMPLETE,
    MANIFEST,
    SAFE_NAME,
    STATE,
    STEP_NAME,
    DamagedCheckpointError,
    lock,
    open_regular,
    step_name,
)
from castalia.checkpoint.save import POLL_SECONDS, Save, discard, texts_of
from castalia.checkpoint.stage import Buffers, require_json, stage
from castalia.core.errors import CheckpointError

LOCK = ".lock"
NO_STEP = -1


@dataclass(frozen=True)
class SaveTiming:
    """What a save cost the caller."""

    step: int
    stall_seconds: float
    """Time until save() returned: the wait for the save before, and the copy of the weights."""
    nbytes: int
    """Bytes that this process hands to the disk."""


class Store:
    """Checkpoints in one folder on a disk that all processes of the run see.

    folder    runs/<name>/checkpoints; made by the first save.
    rank      this process, 0 <= rank < world. Every process calls save and load_latest at the same points.
    expired   given the complete steps, those to delete after a save, for instance SavePolicy.expired.
    agree     smallest of a number over all processes; by default an all-reduce in the default group. Called here
              and in load_latest, never during a save.
    patience  seconds that a process waits for another one, or for another run that saves here, before it gives up.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int = 0,
        world: int = 1,
        expired: Callable[[list[int]], list[int]] | None = None,
        agree: Callable[[int], int] | None = None,
        patience: float = 1800.0,
    ) -> None:
        if "://" in str(folder):
            raise CheckpointError(
                f"checkpoints go to a folder on a disk, not to {folder}; mount it, or copy later"
            )
        self.folder = Path(folder)
        self.rank, self.world = rank, world
        self.expired = expired
        self.agree = agree or (smallest if world > 1 else int)
        self.patience = patience
        self.warnings: list[str] = []
        self.session = self.agree(random.SystemRandom().getrandbits(62))
        self.saves = 0
        self.buffers: Buffers = {}
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.saving: Save | None = None
        self.written: list[float] = []
        """Seconds that each finished save took to write, from its background thread's begin."""
        self.stalled = 0.0
        """Seconds that save() took in all until it returned."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        asynchronous: bool = True,
    ) -> SaveTiming:
        """Save this process's share of `tensors`, and `state` and `files` (rank 0's), as the checkpoint of `step`.

        tensors  by name, each in a group: `model.…`, `optim.…`. Plain ones are rank 0's, DTensors each rank's.
        state    plain JSON values, small: progress, schedule, data fingerprint, loss scale.
        files    name -> text, for instance config.yaml and tokenizer.json.
        Returns when the values are copied and may change; with asynchronous=False when the checkpoint exists.
        A step that is there and good already is left as it is, a damaged one is replaced.
        Raises   CheckpointError, also for a failure of the save before.
        """
        begin = time.perf_counter()
        self.wait()
        require_json(dict(state))
        require_file_names(files or {})
        texts = texts_of(json.dumps(dict(state), indent=1) + "\n", files or {})
        staged = stage(tensors, self.rank, self.buffers if asynchronous else None)
        self.saves += 1
        mark = f"{self.session:x}-{self.saves}"
        save = Save(self.folder, step, mark, self.rank, self.world, staged, texts, self.patience)
        nbytes = sum(item.nbytes for item in staged.values())
        self.saving = save
        self.thread = threading.Thread(
            target=self.run, args=(save,), name=f"save-{step}"
        )  # the process ends after it
        self.thread.start()
        if not asynchronous:
            self.wait()
        timing = SaveTiming(step, time.perf_counter() - begin, nbytes)
        self.stalled += timing.stall_seconds
        return timing

    def run(self, save: Save) -> None:
        """The background thread: the save, then on rank 0 the deletion of what has expired."""
        begin = time.perf_counter()
        try:
            if self.has_good(save.step):
                return
            if self.rank > 0:
                save.run()
                self.written.append(time.perf_counter() - begin)
                return
            with self.writing():
                self.sweep(save)
                save.run()
                self.written.append(time.perf_counter() - begin)
                # A later step is one that was passed over as damaged: it must not count as newest.
                known = [step for step in self.steps() if step <= save.step]
                for step in self.expired(known) if self.expired else []:
                    self.delete(step)
        except CheckpointError as error:
            self.error = error
        except Exception as error:
            self.error = CheckpointError(f"cannot save step {save.step} in {self.folder}: {error}")
            self.error.__cause__ = error

    def wait(self) -> None:
        """Return when no save is under way.

        Raises  CheckpointError if the last one failed; once.
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error:
            raise error

    def hurry(self, seconds: float) -> None:
        """A process is lost: from now on the save that is under way waits this long for another process, not longer."""
        if self.saving:
            self.saving.patience = min(self.saving.patience, seconds)

    def steps(self) -> list[int]:
        """Steps whose checkpoints are whole, in order."""
        return complete_steps(self.folder)

    def latest(self) -> int | None:
        """The newest of them, or None."""
        return max(self.steps(), default=None)

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`.

        Raises  CheckpointError listing the steps that there are.
        """
        folder = self.folder / step_name(step)
        if not (folder / COMPLETE).exists():
            have = ranges_of(self.steps()) or "none"
            raise CheckpointError(
                f"no complete checkpoint of step {step} in {self.folder}; have: {have}"
            )
        return folder

    def load(self, step: int, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
        """Fill `tensors` in place from the checkpoint of `step`, and return its state; see load_into."""
        return load_into(self.folder_of(step), tensors, prefix)

    def load_latest(
        self, tensors: Mapping[str, Tensor], elsewhere: Collection[str] = ()
    ) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest checkpoint that is good on every process, loaded into `tensors`; None if none is.

        `elsewhere` names the tensors that only other processes hold, such as those of other stages of a pipeline.
        A damaged one is passed over with a warning that names the file; `warnings` keeps these lines.
        Raises  CheckpointError if there are checkpoints and none is good, or the good one does not fit `tensors`.
        """
        self.report_unfinished()
        ready: dict[int, Ready] = {}
        step = self.newest_good(partial(make_ready, tensors=tensors, elsewhere=elsewhere), ready)
        if step == NO_STEP:
            if have := self.steps():
                reasons = "".join(f"\n  {line}" for line in self.warnings)
                raise CheckpointError(
                    f"none of the checkpoints in {self.folder} (steps {ranges_of(have)}) is good; restore one from a"
                    f" copy, or move the folder away to begin again:{reasons}"
                )
            return None
        return step, ready[step].fill()

    def newest_good(self, check: Callable[[Path], Ready], ready: dict[int, Ready]) -> int:
        """The newest step that every process finds good; NO_STEP if there is none. What was checked comes into `ready`.

        Each process offers its own newest below what was agreed before, until the smallest offer stands twice.
        """
        steps, agreed = self.steps(), None
        while True:
            limit, mine = agreed, NO_STEP
            for step in reversed([step for step in steps if limit is None or step <= limit]):
                if step in ready or self.is_good(step, check, ready):
                    mine = step
                    break
            agreed = self.agree(mine)
            if agreed in (limit, NO_STEP) or self.world == 1:
                return agreed

    def is_good(self, step: int, check: Callable[[Path], Ready], ready: dict[int, Ready]) -> bool:
        """Whether the files of a step that this process needs are whole; if not, that is a warning."""
        try:
            ready[step] = check(self.folder / step_name(step))
        except DamagedCheckpointError as error:
            self.warn(f"{error}; the checkpoint of step {step} is passed over")
            return False
        return True

    def has_good(self, step: int) -> bool:
        """Whether the checkpoint of `step` exists and each of its files is what was written."""
        folder = self.folder / step_name(step)
        if not (folder / COMPLETE).exists():
            return False
        try:
            verify(folder)
        except CheckpointError:
            return False
        return True

    def delete(self, step: int) -> bool:
        """Delete the checkpoint of `step`, unless a process is reading it; whether it is gone."""
        folder = self.folder_of(step)
        with open_regular(folder / COMPLETE) as file:
            if not lock(file.fileno(), fcntl.LOCK_EX):
                return False
            discard(folder)
        return True

    def report_unfinished(self) -> None:
        """Say which saves never finished; their folders do not count, and the next save removes temporary ones."""
        if self.rank == 0 and self.folder.is_dir():
            for item in sorted(self.folder.iterdir()):
                name = item.name.removeprefix(".").removesuffix(".tmp")
                if STEP_NAME.fullmatch(name) and not (self.folder / name / COMPLETE).exists():
                    self.warn(f"{item} is of a save that never finished; it is passed over")

    def warn(self, message: str) -> None:
        """Show a warning and keep it."""
        self.warnings.append(message)
        warnings.warn(message, stacklevel=3)

    def sweep(self, save: Save) -> None:
        """Remove what killed saves and deletions left. Only under the lock, so none of it belongs to a living save."""
        for item in list(self.folder.iterdir()):
            if item.name.startswith(".step-") and item.suffix in (".failed", ".half"):
                item.unlink()
            elif item == save.temporary and self.world > 1:
                continue  # other ranks may be at work in it already
            elif item.name.startswith((".trash-", ".step-")):
                shutil.rmtree(item, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one that writes in this folder; the lock ends with the process, however it ends.

        Raises  CheckpointError if another run still writes here after `patience` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = time.monotonic() + self.patience
            while not lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"another run is saving in {self.folder}; give each run its own output folder"
                    )
                time.sleep(POLL_SECONDS)
            yield
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # also where a forked worker holds a copy of the descriptor
        finally:
            os.close(descriptor)


def require_file_names(files: Mapping[str, str]) -> None:
    """Refuse names that lead out of the folder or collide with the store's own.

    Raises  CheckpointError naming the file.
    """
    for name in files:
        taken = (
            name in (STATE, MANIFEST, COMPLETE)
            or name.startswith("rank-")
            or name.endswith(".safetensors")
        )
        if taken or not SAFE_NAME.fullmatch(name):
            raise CheckpointError(
                f"cannot save a file named {name!r} in a checkpoint; choose a plain name of its own"
            )


def smallest(number: int) -> int:
    """The smallest of a number over all processes of the default process group."""
    if not dist.is_initialized():
        raise CheckpointError(
            "a store of several processes needs torch.distributed, or agree= of its own"
        )
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return int(shared)
