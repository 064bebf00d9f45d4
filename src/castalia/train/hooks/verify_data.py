"""Whole training files against their hashes, in the background of the steps or before them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from castalia.core.errors import DataError
from castalia.curate.verify import known_files
from castalia.data.config import PREFIXES
from castalia.data.fingerprint import FULL_BYTES
from castalia.data.indexed import without_suffix
from castalia.data.seals import RecordedFile, bin_paths, path_of
from castalia.data.shards import base_of
from castalia.distributed import World
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.storage.urls import is_url
from castalia.train.hashing import BackgroundHashing, HashingState
from castalia.train.stopping import Stop, say

SHARES = {"cpu": 0.02, "cuda": 0.2}
"""Share of a core by the device: on a CPU the passes need every core."""
POLL_SECONDS = 0.2
"""Time between two looks at how far the hashing is before the first step."""


class VerifyData(Hook):
    """Hashes the training files that a start only samples; a damaged one stops every rank.

    It stands before `Save` in the list, so that the step at which damage is found is not saved.
    """

    hashing: BackgroundHashing | None = None
    reported = False

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        watchdog: Any,
        ask_stop: Callable[[Stop], None],
        agreed_stop: Callable[[], Stop],
        stop_if_asked: Callable[[], bool],
    ) -> None:
        """Begin on the main rank; with data.verify `start` end there, too.

        Raises  DataError, on every rank, if a file is damaged and was read before the first step.
        """
        self.ask_stop = ask_stop
        self.agreed_stop = agreed_stop
        self.stop_if_asked = stop_if_asked
        self.mode = config.data.verify
        if self.mode == "never":
            return
        if world.leads:
            share = 1.0 if self.mode == "start" else SHARES.get(world.device.type, SHARES["cpu"])
            files, unknown = large_files(config)
            if unknown:
                say(f"note: {unknown_sentence(unknown)}")
            if files:
                self.hashing = BackgroundHashing(files, share)
                self.hashing.start()
        if self.mode == "start":
            self.wait(world, watchdog)

    def wait(self, world: World, watchdog: Any) -> None:
        """Wait until the main rank has hashed all files.

        Raises  DataError, on every rank.
        """
        state = HashingState.HASHING
        # A short collective now and then: one that waited for hours would be taken for a hang.
        while state is HashingState.HASHING:
            own = HashingState.HASHING
            if world.leads:
                own = self.hashing.state if self.hashing else HashingState.WHOLE
            state = HashingState(*world.largest(own))
            watchdog.progressed()
            time.sleep(POLL_SECONDS if state is HashingState.HASHING else 0)
        if state is HashingState.DAMAGED:
            raise DataError(self.sentence("before the first step"))

    def after_step(self, step: Step) -> None:
        """Tell that all files are whole, once; stop at a damaged one.

        Raises  DataError, on every rank after the same step.
        """
        if self.mode == "never":
            return
        if self.hashing is not None and self.hashing.state is HashingState.DAMAGED:
            # The ranks agree on a stop within the next step.
            self.ask_stop(Stop.DAMAGED)
        if step.last:
            # There is no next step.
            self.stop_if_asked()
        if self.agreed_stop() is Stop.DAMAGED:
            where = f"found at step {step.number}, which is not saved"
            raise DataError(self.sentence(f"{where}; the steps before it may have read it"))
        if self.hashing is not None and not self.reported:
            self.report(step)

    def report(self, step: Step) -> None:
        """Say how far the files are known, when all are or the run ends."""
        assert self.hashing is not None
        total = self.hashing.total
        if self.hashing.state is HashingState.WHOLE:
            say(f"data: {total:,} bytes are as their records say, hashed by step {step.number}")
        elif step.last:
            share = self.hashing.done / max(1, total)
            say(
                f"data: {share:.0%} of {total:,} bytes were hashed before the run ended, and no"
                " damage found; `castalia data verify` reads all"
            )
        else:
            return
        self.reported = True

    def sentence(self, when: str) -> str:
        """The error of this rank."""
        if self.hashing is None:
            return f"the main rank found a damaged training file ({when})"
        return f"{self.hashing.fault} ({when})"

    def close(self) -> None:
        """End the thread."""
        if self.hashing is not None:
            self.hashing.close()


def large_files(config: RunConfig) -> tuple[list[RecordedFile], list[str]]:
    """The files that no start reads whole: those with a known hash, and the names of the others."""
    files: dict[tuple[Any, ...], RecordedFile] = {}
    unknown = []
    for prefix, is_small_read in prefixes_of(config):
        known = known_files(prefix)
        for name in (".bin", ".idx"):
            paths = tuple(bin_paths(prefix)) if name == ".bin" else (path_of(prefix, name),)
            size = sum(path.stat().st_size for path in paths)
            if size <= FULL_BYTES and is_small_read:
                continue
            # A list may have the hash of each shard.
            parts = [known[path.name] for path in paths if path.name in known]
            if name in known:
                files[paths] = known[name]
            elif len(parts) == len(paths):
                files |= {part.paths: part for part in parts}
            elif size > FULL_BYTES:
                unknown.append(str(paths[0]))
    return list(files.values()), unknown


def prefixes_of(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Prefix of each training file, and whether a start compares its small files."""
    seen = set()
    for name in PREFIXES:
        for path in getattr(config.data, name):
            if is_url(path):
                # Hashing it whole would fetch it whole: size and tag are compared instead.
                continue
            prefix = base_of(without_suffix(path))
            if prefix not in seen:
                seen.add(prefix)
                # Rewards are read into memory, and their files forgotten.
                yield prefix, not name.endswith("rewards")


def unknown_sentence(paths: list[str]) -> str:
    """What is not known about large files, and how to know it."""
    prefix = base_of(paths[0].removesuffix(".bin").removesuffix(".idx"))
    others = f" (and {len(paths) - 1} others)" if len(paths) > 1 else ""
    return (
        f"no record has the hash of {paths[0]}{others}, of which a start compares 64 blocks of"
        f" 1 MiB: `castalia data verify {prefix} --write-hashes {prefix}.sha256` makes one"
    )
