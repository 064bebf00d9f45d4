"""The checkpoints of one run: save in the background, load the newest good one, delete old ones."""

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

from torch import Tensor

from castalia.checkpoint.find import complete_steps, ranges_of
from castalia.checkpoint.load import Ready, load_into, make_ready, verify
from castalia.checkpoint.manifest import (
    MANIFEST,
    SAFE_NAME,
    STATE,
    DamagedCheckpointError,
    open_plain,
)
from castalia.checkpoint.names import COMPLETE, STEP_NAME, step_name
from castalia.checkpoint.save import POLL_SECONDS, RankSave, discard, texts_of
from castalia.checkpoint.stage import Buffers, require_json, stage
from castalia.core.errors import CheckpointError
from castalia.core.files import locked

LOCK = ".lock"
NO_STEP = -1
"""Stands for "none" where ranks exchange integers; smaller than every step."""
FAR = 1 << 62
"""Larger than every step: the word of a rank that leaves the choice to another."""


@dataclass(frozen=True)
class SaveTiming:
    """Cost of one save for its caller."""

    step: int
    stall_seconds: float
    """Time until save() returned: the wait for the save before, and the copy of the weights."""
    nbytes: int
    """Bytes that this rank writes."""


class Store:
    """Checkpoints in one folder on a disk that all ranks of the run share.

    folder    runs/<name>/checkpoints; the first save makes it.
    rank      0 <= rank < world. Every rank calls save and load_latest at the same points.
    expired   complete steps -> steps to delete after a save, for instance SavePolicy.expired.
    agree     the smallest of a number over all ranks, for instance World.smallest; needed when
              world > 1. Called here and in load_latest, never during a save.
    patience  seconds to wait for another rank, or for another run that saves here.
    rescue    called on rank 0 where the newest steps are damaged: fetches a whole copy of a step
              after the given one from elsewhere; that step, or None.
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
        rescue: Callable[[int], int | None] | None = None,
    ) -> None:
        if "://" in str(folder):
            raise CheckpointError(
                f"checkpoints need a local folder, got {folder}; mount it, or copy them later"
            )
        self.folder = Path(folder)
        self.rank = rank
        self.world = world
        self.expired = expired
        assert agree or world == 1, "several ranks need agree= to choose a checkpoint together"
        self.agree = agree or int
        self.patience = patience
        self.rescue = rescue
        self.warnings: list[str] = []
        # Ranks recognize notes of their own save by it. A clock could repeat after a restart.
        self.session = self.agree(random.SystemRandom().getrandbits(62))
        self.saves = 0
        # Kept between saves; see castalia.checkpoint.stage.
        self.buffers: Buffers = {}
        self.thread: threading.Thread | None = None
        self.error: CheckpointError | None = None
        self.saving: RankSave | None = None
        self.written: list[float] = []
        """Seconds that each finished save took in its background thread."""
        self.stalled = 0.0
        """Seconds that the caller waited in save(), in all."""

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, newest step {self.latest()})"

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
        asynchronous: bool = True,
        relied_on: Callable[[], None] = lambda: None,
    ) -> SaveTiming:
        """Save this rank's share of `tensors` as the checkpoint of `step`.

        tensors  by name, each in a group: `model.…`, `optim.…`. Plain tensors are written by rank
                 0, DTensors by every rank.
        state    small JSON values: progress, schedule, data fingerprint, loss scale. Rank 0's
                 count.
        files    name -> text, for instance config.yaml and tokenizer.json. Rank 0's count.
        relied_on  called on rank 0, in the thread that writes, before the checkpoint is complete:
                 forces to the disk what lies elsewhere and must be there after a power cut.
        Returns once the values are copied and may change; with asynchronous=False once the
        checkpoint exists. A good checkpoint of this step is kept, a damaged one is replaced.
        Raises   CheckpointError, also for a failure of the previous save.
        """
        begin = time.perf_counter()
        # One save at a time: two would share the buffers.
        self.wait()
        require_json(dict(state))
        require_file_names(files or {})
        texts = texts_of(json.dumps(dict(state), indent=1) + "\n", files or {})
        staged = stage(tensors, self.rank, self.buffers if asynchronous else None)
        self.saves += 1
        mark = f"{self.session:x}-{self.saves}"
        save = RankSave(
            self.folder,
            step,
            mark,
            self.rank,
            self.world,
            staged,
            texts,
            self.patience,
            relied_on,
        )
        nbytes = sum(item.nbytes for item in staged.values())
        self.saving = save
        # Not a daemon thread: the process must not end before the checkpoint is whole.
        self.thread = threading.Thread(target=self.run, args=(save,), name=f"save-{step}")
        self.thread.start()
        if not asynchronous:
            self.wait()
        timing = SaveTiming(step, time.perf_counter() - begin, nbytes)
        self.stalled += timing.stall_seconds
        return timing

    def run(self, save: RankSave) -> None:
        """The background thread: the save, then on rank 0 the deletion of expired checkpoints."""
        begin = time.perf_counter()
        try:
            # Every rank verifies the same files, so all ranks skip the save or none does.
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
                # A later step was skipped as damaged when the run resumed. It must not count as
                # the newest, or retention would delete the good ones below it.
                known = [step for step in self.steps() if step <= save.step]
                for step in self.expired(known) if self.expired else []:
                    self.delete(step)
        except CheckpointError as error:
            self.error = error
        except Exception as error:
            self.error = CheckpointError(f"cannot save step {save.step} in {self.folder}: {error}")
            self.error.__cause__ = error

    def wait(self) -> None:
        """Return when no save is in progress.

        Raises  CheckpointError if the last save failed; only once.
        """
        if self.thread:
            self.thread.join()
            self.thread = None
        error = self.error
        self.error = None
        if error:
            raise error

    def hurry(self, seconds: float) -> None:
        """After the loss of a rank: limit how long the save in progress waits for its note."""
        if self.saving:
            self.saving.patience = min(self.saving.patience, seconds)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return complete_steps(self.folder)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def folder_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`.

        Raises  CheckpointError listing the complete steps.
        """
        folder = self.folder / step_name(step)
        if not (folder / COMPLETE).exists():
            have = ranges_of(self.steps()) or "none"
            raise CheckpointError(
                f"no complete checkpoint of step {step} in {self.folder}; choose one of {have}"
            )
        return folder

    def load(self, step: int, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
        """Fill `tensors` in place from the checkpoint of `step`, and return its state; see
        load_into."""
        return load_into(self.folder_of(step), tensors, prefix)

    def load_latest(
        self, tensors: Mapping[str, Tensor], elsewhere: Collection[str] = ()
    ) -> tuple[int, dict[str, Any]] | None:
        """Fill `tensors` from the newest checkpoint that is good on every rank: (step, state), or
        None.

        `elsewhere` names tensors that only other ranks hold, such as those of other pipeline
        stages. A damaged checkpoint is skipped with a warning that names the file; `warnings`
        keeps the lines.
        Raises  CheckpointError if checkpoints exist and none is good, or the good one does not fit.
        """
        self.report_unfinished()
        self.end_deletions()
        ready: dict[int, Ready] = {}
        check = partial(make_ready, tensors=tensors, elsewhere=elsewhere)
        step = self.newest_good(check, ready)
        fetched = self.rescued(step)
        if fetched != NO_STEP:
            step = self.newest_good(check, ready, fetched)
        if step == NO_STEP:
            if have := self.steps():
                reasons = "".join(f"\n  {line}" for line in self.warnings)
                raise CheckpointError(
                    f"none of the checkpoints in {self.folder} (steps {ranges_of(have)}) is good;"
                    f" restore one from a copy, or move the folder away to begin again:{reasons}"
                )
            return None
        return step, ready[step].fill()

    def rescued(self, good: int) -> int:
        """A step after `good`, the newest whole one here, that came from a copy elsewhere; NO_STEP
        if none did. Collective."""
        # All ranks see one folder, so that all enter or none does.
        if self.rescue is None or max(self.steps(), default=NO_STEP) <= good:
            return NO_STEP
        fetched: int | None = FAR
        if self.rank == 0:
            fetched = self.rescue(good)
        return self.agree(NO_STEP if fetched is None else fetched)

    def newest_good(
        self, check: Callable[[Path], Ready], ready: dict[int, Ready], limit: int | None = None
    ) -> int:
        """The newest step, up to `limit`, that every rank finds good, or NO_STEP; checked ones are
        put into `ready`.

        Each rank checks only the files that it needs, so ranks may differ on what is good. In each
        round every rank offers its newest good step not above the last agreement, and the smallest
        offer is the next agreement. The same agreement twice in a row means that all ranks hold it.
        """
        steps = self.steps()
        agreed = limit
        while True:
            limit = agreed
            mine = NO_STEP
            for step in reversed([step for step in steps if limit is None or step <= limit]):
                if step in ready or self.is_good(step, check, ready):
                    mine = step
                    break
            agreed = self.agree(mine)
            # One rank has no one to differ from, and no collective to wait in.
            if agreed in (limit, NO_STEP) or self.world == 1:
                return agreed

    def is_good(self, step: int, check: Callable[[Path], Ready], ready: dict[int, Ready]) -> bool:
        """Whether the files that this rank needs of a step are intact; a warning if not."""
        try:
            ready[step] = check(self.folder / step_name(step))
        except DamagedCheckpointError as error:
            self.warn(f"{error}; skipping the checkpoint of step {step}")
            return False
        return True

    def has_good(self, step: int) -> bool:
        """Whether the checkpoint of `step` exists and every file of it is intact."""
        folder = self.folder / step_name(step)
        if not (folder / COMPLETE).exists():
            return False
        try:
            verify(folder)
        except CheckpointError:
            return False
        return True

    def delete(self, step: int) -> bool:
        """Delete the checkpoint of `step` unless another process reads it; whether it was
        deleted."""
        folder = self.folder_of(step)
        with open_plain(folder / COMPLETE) as file:
            # Readers hold a shared lock, so this fails while anyone reads.
            if not locked(file):
                return False
            discard(folder)
        return True

    def report_unfinished(self) -> None:
        """Warn of unfinished saves. They are no checkpoints; the next save removes temporary
        folders."""
        if self.rank == 0 and self.folder.is_dir():
            for item in sorted(self.folder.iterdir()):
                name = item.name.removeprefix(".").removesuffix(".tmp")
                if STEP_NAME.fullmatch(name) and not (self.folder / name / COMPLETE).exists():
                    self.warn(f"{item} is left over from an unfinished save; ignoring it")

    def end_deletions(self) -> None:
        """Delete what killed deletions left, also of a run that will save no more."""
        left = list(self.folder.glob(".trash-*"))
        if self.rank or not left:
            return
        with open(self.folder / LOCK, "ab") as lock:
            # Whoever saves here deletes them itself.
            if locked(lock):
                for folder in left:
                    shutil.rmtree(folder, ignore_errors=True)

    def warn(self, message: str) -> None:
        """Show a warning and keep it."""
        self.warnings.append(message)
        warnings.warn(message, stacklevel=3)

    def sweep(self, save: RankSave) -> None:
        """Remove leftovers of killed saves and deletions. Under the lock none belongs to a running
        save."""
        for item in list(self.folder.iterdir()):
            if item.name.startswith(".step-") and item.suffix in (".failed", ".half"):
                item.unlink()
            elif item == save.temporary and self.world > 1:
                continue  # other ranks may already write into it
            elif item.name.startswith((".trash-", ".step-")):
                shutil.rmtree(item, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's write lock; the kernel drops it when the process ends, even by SIGKILL.

        Raises  CheckpointError if another run still writes here after `patience` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = time.monotonic() + self.patience
            while not locked(descriptor):
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"another run is saving in {self.folder};"
                        " give each run its own output folder"
                    )
                time.sleep(POLL_SECONDS)
            yield
            # Closing is not enough: a forked data worker may hold a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def require_file_names(files: Mapping[str, str]) -> None:
    """Refuse names that leave the folder or collide with the store's own files.

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
                f"cannot save a file named {name!r} in a checkpoint; choose another plain file name"
            )
