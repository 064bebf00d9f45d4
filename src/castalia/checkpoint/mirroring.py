"""`Mirroring`: a thread that keeps the mirror of a run up to date while it trains.

It never stops the run: what fails is tried again, with one warning for each time that the mirror is
gone. Only the leading rank has one, since all ranks save into one folder.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from castalia.checkpoint.find import complete_steps, ranges_of
from castalia.checkpoint.mirror import CHECKPOINTS, Mirror
from castalia.checkpoint.names import COMPLETE, step_name
from castalia.checkpoint.owner import Owner
from castalia.core.errors import CastaliaError
from castalia.monitor.display import size_text
from castalia.storage import StorageError

POLL_SECONDS = 1.0
"""Time between two looks for a finished checkpoint that nobody announced."""
LOG_SECONDS = 300.0
"""Time after which the logs are sent though no checkpoint was."""
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds until a mirror that is gone is tried again, doubled each time, and their limit."""

Expired = Callable[[list[int]], list[int]]


class Mirroring:
    """Sends finished steps, the newest first, and the logs.

    expired  of the mirror: complete steps -> those to delete there.
    hold     most steps that the local policy would delete and that stay until they are mirrored.
    say      shows a line; warn shows a warning.
    owner    the claim on the mirror, checked; it is taken before anything is sent.
    """

    def __init__(
        self,
        mirror: Mirror,
        *,
        expired: Expired,
        hold: int,
        say: Callable[[str], object],
        warn: Callable[[str], None],
        owner: Owner | None = None,
    ) -> None:
        self.mirror = mirror
        self.expired = expired
        self.hold = hold
        self.say = say
        self.warn = warn
        self.owner = owner
        self.there: set[int] | None = None
        """Steps that are whole on the mirror; None until it was asked."""
        self.unsure: set[int] = set()
        """Those among them that this process has not compared: they may be damaged, and saved anew
        here."""
        self.sent: list[int] = []
        """Steps that this process sent."""
        self.unfit: dict[int, bytes] = {}
        """Local steps that are damaged -> their COMPLETE; not sent until they are saved anew."""
        self.fault: StorageError | None = None
        """Why the last attempt failed; None after one that did not."""
        self.told: set[int] = set()
        self.wakes = threading.Event()
        self.ending = threading.Event()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True, name="mirror")

    @property
    def folder(self) -> Path:
        """The folder of the local checkpoints."""
        return self.mirror.folder / CHECKPOINTS

    def start(self) -> None:
        """Begin with what an earlier start left."""
        self.thread.start()
        if self.owner is not None:
            self.owner.begin(self.give_up)

    def run(self) -> None:
        """The thread: send what is missing, and wait for more, until the run ends."""
        pause = FIRST_PAUSE
        logs_at = time.monotonic()
        while not self.mirror.store.stopped.is_set():
            # Read before the work: what is finished meanwhile is seen in the next round.
            is_ending = self.ending.is_set()
            self.wakes.clear()
            late = time.monotonic() - logs_at > LOG_SECONDS
            try:
                self.round(with_logs=is_ending or late)
            except StorageError as error:
                self.fail(error)
                self.mirror.store.stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            except Exception as error:
                # Training goes on whatever it is, and the user learns of it.
                self.warn(f"checkpoint.mirror: {type(error).__name__}: {error}; not mirrored")
                break
            if late:
                logs_at = time.monotonic()
            self.recover()
            pause = FIRST_PAUSE
            if is_ending:
                self.leave()
                break
            self.wakes.wait(POLL_SECONDS)
        self.ended.set()

    def round(self, *, with_logs: bool) -> None:
        """Send every step that is missing, and the logs if there were any or they are due."""
        if self.owner is not None and not self.owner.is_taken:
            # The mirror was gone when the run began.
            self.owner.check(self.say)
            self.owner.take()
        if self.there is None:
            self.there = set(self.mirror.steps())
            self.unsure = set(self.there)
        for step in self.waiting():
            self.send(step)
            self.expire()
        self.expire()
        if with_logs:
            self.mirror.send_logs()

    def leave(self) -> None:
        """Say on the mirror that this start sends nothing more."""
        if self.owner is not None:
            # Where this fails, a start elsewhere waits for a sign of life, which does no harm.
            with suppress(StorageError):
                self.owner.release()

    def give_up(self, reason: str) -> None:
        """Send nothing more: the mirror is another start's by now."""
        self.fault = StorageError(reason)
        self.mirror.store.stopped.set()
        self.warn(
            f"checkpoint.mirror: {self.mirror.store.url}: {reason}; training goes on, and nothing"
            " more is sent"
        )

    def send(self, step: int) -> None:
        """Send one step, with the logs as they are by then."""
        assert self.there is not None
        before = self.mirror.sent_bytes
        mark = self.mark_of(step)
        try:
            self.mirror.send_step(step, self.mirror.send_logs)
        except StorageError:
            raise
        except CastaliaError as error:
            # A step that was deleted meanwhile is no fault.
            if step in complete_steps(self.folder):
                self.unfit[step] = mark
                self.warn(f"checkpoint.mirror: step {step} is not mirrored: {error}")
            return
        self.there.add(step)
        self.unsure.discard(step)
        if self.mirror.sent_bytes > before:
            self.sent.append(step)

    def expire(self) -> None:
        """Delete there what its policy does not keep."""
        assert self.there is not None
        for old in self.surplus(self.there, self.sound_steps()):
            self.mirror.delete_step(old)
            self.there.discard(old)
            self.unsure.discard(old)

    def mark_of(self, step: int) -> bytes:
        """COMPLETE of a local step, which every save has of its own; empty without one."""
        try:
            return (self.folder / step_name(step) / COMPLETE).read_bytes()
        except OSError:
            return b""

    def sound_steps(self) -> list[int]:
        """The complete local steps, ascending, without those that were found damaged."""
        # A copy: the other thread may add to it meanwhile.
        unfit = dict(self.unfit)
        return [
            step
            for step in complete_steps(self.folder)
            if step not in unfit or unfit[step] != self.mark_of(step)
        ]

    def surplus(self, steps: set[int], here: list[int]) -> list[int]:
        """Those of `steps` that the policy of the mirror does not keep, beside the local `here`."""
        # A step beyond the local ones is damaged, or of an earlier start. As the newest it would
        # push out the good ones below it.
        newest = max(here, default=-1)
        return self.expired(sorted(step for step in steps if step <= newest))

    def waiting(self) -> list[int]:
        """The steps that are to be mirrored and are not yet, the newest first."""
        here = self.sound_steps()
        there = self.there or set()
        kept = set(here) - set(self.surplus(there | set(here), here))
        return sorted(kept - (there - self.unsure), reverse=True)

    def fail(self, error: StorageError) -> None:
        """Tell once that the mirror is gone."""
        if self.mirror.store.stopped.is_set():
            # Broken off: why, is known already where another start has taken the mirror over.
            self.fault = self.fault or error
            return
        if self.fault is None:
            self.warn(
                f"checkpoint.mirror: {error}; training goes on, and it is tried again until the end"
            )
        self.fault = error

    def recover(self) -> None:
        """Tell that a mirror that was gone has all again."""
        if self.mirror.store.stopped.is_set():
            # The work was done, and the mirror is another start's since.
            return
        if self.fault is not None:
            self.say(f"checkpoint.mirror: {self.mirror.store.url} is back and up to date")
        self.fault = None

    def spare(self, steps: list[int]) -> list[int]:
        """Of steps that the local policy deletes those that may go: mirrored, or too many wait.

        Called when a checkpoint was finished.
        """
        self.wakes.set()
        waiting = set(self.waiting())
        held = [step for step in steps if step in waiting]
        given_up = held[: max(0, len(held) - self.hold)]
        for step in given_up:
            if step not in self.told:
                self.told.add(step)
                self.warn(
                    f"checkpoint.mirror: step {step} is deleted here before it is mirrored:"
                    f" {len(held)} steps wait, and checkpoint.mirror.hold is {self.hold}"
                )
        return [step for step in steps if step not in held or step in given_up]

    def finish(self, seconds: float) -> None:
        """Wait at most so long until all is there, and say what is not."""
        self.ending.set()
        self.wakes.set()
        begun = time.monotonic()
        if not self.ended.wait(min(seconds, 2.0)) and seconds > 2.0:
            self.say(f"checkpoint.mirror: waiting up to {seconds:g} s for {self.mirror.store.url}")
            self.ended.wait(max(0.0, seconds - (time.monotonic() - begun)))
        whole = self.ended.is_set()
        # Ends every wait of the thread, which dies with the process at the latest.
        self.mirror.store.stopped.set()
        missing = self.waiting()
        if whole and not missing and self.fault is None:
            self.say(self.summary())
            return
        reason = f" ({self.fault})" if self.fault else ""
        names = "the newest lines of the logs are"
        if missing:
            names = f"step {ranges_of(sorted(missing))} and the logs are"
        if self.there is None:
            # Nothing could be asked: some may be there from an earlier start.
            names = "what this run saved may be"
        self.warn(
            f"checkpoint.mirror: {names} not in {self.mirror.store.url}{reason}; nothing is lost"
            " here, and the same command sends it"
        )

    def summary(self) -> str:
        """What is there now."""
        text = f"checkpoint.mirror: {self.mirror.store.url} has step"
        text += f" {ranges_of(sorted(self.there or ()))}"
        sent = size_text(self.mirror.sent_bytes)
        return f"{text}; {len(self.sent)} sent now, {sent} with the logs"
