"""Signals: finish the step, save, and leave the loop on all ranks together."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from castalia.distributed import World
from castalia.runs.hook import Hook, Step
from castalia.train.resume import Checkpoints
from castalia.train.stopping import STDERR, SignalReader, Stop, say

ECHO = 1.0
"""Seconds within which a second SIGINT on several ranks is the first one, passed on by a launcher
that the terminal has interrupted, too."""


class StopOnSignal(Hook):
    """Turns signals into requests to stop; a second Ctrl-C ends the process at once.

    As a context manager it catches them until the end of the block, else until the hook is closed.
    """

    # Slurm sends SIGTERM at the end of a job, and SIGUSR1 some minutes before if asked to; LSF and
    # Grid Engine warn by SIGUSR2; a terminal that closes sends SIGHUP.
    polite = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    reader: SignalReader | None = None
    held = False
    """Whether a block holds on to the signals beyond `close`."""
    at_end = False
    """Whether the last step is done, so that only the save is left."""
    announced = False
    """Whether the user has read that a signal came."""
    interrupted: float | None = None
    """When the first SIGINT came, in seconds of the monotonic clock."""

    def start(
        self, *, ask_stop: Callable[[Stop], None], checkpoints: Checkpoints, world: World
    ) -> None:
        """Catch the signals."""
        self.ask_stop = ask_stop
        self.checkpoints = checkpoints
        self.echo = ECHO if world.size > 1 else 0.0
        self.reader = SignalReader((signal.SIGINT, *self.polite), self.receive)

    def receive(self, number: signal.Signals) -> None:
        """Answer a signal. Runs beside the main thread."""
        stop = Stop.POLITE
        if number is signal.SIGINT:
            stop = Stop.INTERRUPTED
            now = time.monotonic()
            if self.interrupted is None:
                self.interrupted = now
            elif now - self.interrupted > self.echo:
                self.end_at_once()
        # One rank may get the signal earlier than the others. The request therefore travels
        # with the step's verdict, and all ranks leave after the same step.
        self.ask_stop(stop)
        if self.announced:
            return
        self.announced = True
        text = f"castalia: {number.name}: saving"
        if not self.at_end:
            text += " after this step"
        if stop is Stop.INTERRUPTED:
            text += "; Ctrl-C again stops at once"
        say(text, sys.stderr)

    def end_at_once(self) -> None:
        """End the process without a save."""
        saved = self.checkpoints.store.latest()
        newest = "no checkpoint is saved"
        if saved is not None:
            newest = f"the newest checkpoint is {self.checkpoints.store.folder_of(saved)}"
        line = f"castalia: stopped at once; {newest}; the same command resumes\n"
        # Neither the main thread, which may wait for another rank, nor a save is waited for.
        with suppress(OSError):
            os.write(STDERR, line.encode())
        os._exit(128 + signal.SIGINT)

    def after_step(self, step: Step) -> None:
        """Know when nothing but the save is left."""
        self.at_end = step.last

    def __enter__(self) -> "StopOnSignal":
        self.held = True
        return self

    def __exit__(self, *error: object) -> None:
        self.held = False
        self.close()

    def close(self) -> None:
        """Restore the previous handlers."""
        if self.reader and not self.held:
            self.reader.close()
            self.reader = None
