"""The copy of the run in an object store: fetched before the run begins, sent while it trains."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from castalia.checkpoint import SavePolicy
from castalia.checkpoint.config import MirrorConfig
from castalia.checkpoint.mirror import STARTED, Mirror
from castalia.checkpoint.mirroring import Mirroring
from castalia.checkpoint.owner import Owner
from castalia.checkpoint.restore import newest_step, rescue, restore
from castalia.core.errors import CheckpointError
from castalia.distributed import World
from castalia.runs.config import RunConfig
from castalia.runs.folder import check_run_folder, require_same_run
from castalia.runs.hook import Hook
from castalia.storage import ObjectStore, StorageError, Transfer
from castalia.train.events import warn
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints
from castalia.train.stopping import Stop, say

MIB = 1 << 20
HURRIED = 10.0
"""Seconds that an interrupted run waits at most."""
CONFIG = "config.yaml"


def mirror_of(config: RunConfig) -> Mirror | None:
    """The mirror that a config names; None without one."""
    options = config.checkpoint.mirror
    if options is None:
        return None
    rate = None if options.rate is None else options.rate * MIB
    transfer = Transfer(rate, int(options.chunk * MIB), options.retries)
    return Mirror(ObjectStore(options.url, transfer, threading.Event()), Path(config.output))


def say_aside(line: str) -> None:
    """Show a line beside the output of the run."""
    say(line, sys.stderr)


def restore_run(config: RunConfig, world: World) -> None:
    """Fetch the run from its mirror if that is further than the run folder; on every rank.

    The leading rank fetches, and has claimed the folder. Nothing happens without a mirror.
    Raises  ConfigError if the mirror is of another run, or another start sends to it now;
            StorageError if it cannot be used, or cannot be reached and may have the only steps;
            CheckpointError if it is damaged.
    """
    if config.checkpoint.mirror is None:
        return
    if world.leads:
        fetch_run(config)
    # No rank may look for a checkpoint that is still on its way.
    world.wait()


def fetch_run(config: RunConfig) -> None:
    """See `restore_run`."""
    mirror = mirror_of(config)
    assert mirror is not None
    here = newest_step(mirror.folder)
    try:
        # What cannot be written must not come out when the first checkpoint is finished.
        mirror.store.write(STARTED, b"")
        refuse_other_run(config, mirror)
        Owner(mirror).check(say_aside)
        step = restore(mirror, say_aside)
    except StorageError as error:
        if here < 0 or not error.passing:
            raise CheckpointError(
                f"checkpoint.mirror: {error}; or set checkpoint.mirror=null to train without it"
            ) from error
        warn(f"checkpoint.mirror: {error}; resuming from the run folder")
        return
    if step is not None:
        say(f"fetched step {step} and the logs from {mirror.store.url}")
        check_run_folder(config)


def rescuer(config: RunConfig) -> Callable[[int], int | None] | None:
    """What fetches a whole step from the mirror in place of damaged ones here, for a `Store`; None
    without a mirror."""
    mirror = mirror_of(config)
    if mirror is None:
        return None

    def fetch(good: int) -> int | None:
        url = mirror.store.url
        try:
            step = rescue(mirror, good, say_aside)
        except StorageError as error:
            warn(f"checkpoint.mirror: {error}; no whole step could be fetched from there")
            return None
        if step is not None:
            which = f"the checkpoints after step {good}" if good >= 0 else "all checkpoints"
            say(f"fetched step {step} from {url}: {which} here are damaged")
        return step

    return fetch


def refuse_other_run(config: RunConfig, mirror: Mirror) -> None:
    """Compare with the config of the run that the mirror is of.

    Raises  ConfigError listing the keys that differ and may not change.
    """
    try:
        text = mirror.store.read(CONFIG)
    except StorageError as error:
        if error.missing:
            return
        raise
    path = mirror.folder / f".{CONFIG}.mirrored"
    try:
        path.write_bytes(text)
        require_same_run(config, path, mirror.store.url)
    finally:
        path.unlink(missing_ok=True)


class MirrorRun(Hook):
    """Sends finished checkpoints and the logs; it stands before `Save`, and so ends after it."""

    mirroring: Mirroring | None = None
    options: MirrorConfig | None = None

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        progress: Progress,
        checkpoints: Checkpoints,
        policy: SavePolicy,
        agreed_stop: Callable[[], Stop],
    ) -> None:
        """Begin in the background, with what an earlier start left."""
        mirror = mirror_of(config) if world.leads else None
        self.options = config.checkpoint.mirror
        if mirror is None or self.options is None:
            return
        self.agreed_stop = agreed_stop
        self.store = checkpoints.store
        self.progress = progress
        own = config.checkpoint.model_copy(update={"keep": self.options.keep})
        there = SavePolicy(own, policy.last_step)
        owner = Owner(mirror)
        # Again: another start may have passed the first look while the model was built. Where the
        # mirror is gone, its thread takes it later.
        with suppress(StorageError):
            owner.check(say_aside)
            owner.take()
        self.mirroring = Mirroring(
            mirror,
            expired=there.expired,
            hold=self.options.hold,
            say=say,
            warn=warn,
            owner=owner,
        )
        expired = self.store.expired or (lambda steps: [])
        spare = self.mirroring.spare
        self.expired = expired
        self.store.expired = lambda steps: spare(expired(steps))
        self.mirroring.start()

    def close(self) -> None:
        """Wait for what is not there yet, for a bounded time."""
        if self.mirroring is None or self.options is None:
            return
        seconds = self.options.wait
        if self.agreed_stop() is Stop.INTERRUPTED:
            # Somebody waits at the keyboard.
            seconds = min(seconds, HURRIED)
        self.mirroring.finish(seconds)
        self.delete_spared()

    def delete_spared(self) -> None:
        """Delete what stayed only until it was mirrored."""
        assert self.mirroring is not None
        # A step that was sent late may be surplus there by now: nobody waits for it either.
        waiting = set(self.mirroring.waiting())
        # As after a save: a later step is damaged, and does not count as the newest.
        known = [step for step in self.store.steps() if step <= self.progress.step]
        for step in self.expired(known):
            if step not in waiting:
                self.store.delete(step)
