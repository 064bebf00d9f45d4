"""SIGTERM and SIGUSR1: finish the step, save, and leave the loop on all ranks together."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from castalia.train.hooks.hook import Hook


class StopOnSignal(Hook):
    """Turns a signal into a request to stop."""

    # Slurm sends SIGTERM at the end of a job, and SIGUSR1 some minutes before if asked to.
    signals = (signal.SIGTERM, signal.SIGUSR1)

    def start(self, *, ask_stop: Callable[[], None]) -> None:
        """Catch the signals."""

        def catch(number: int, frame: FrameType | None) -> Any:
            # One rank may get the signal earlier than the others. The request therefore travels
            # with the step's verdict, and all ranks leave after the same step.
            ask_stop()
            name = signal.Signals(number).name
            print(f"castalia: {name}: saving after this step", file=sys.stderr, flush=True)

        # Kept, because the trainer may run inside a program with handlers of its own.
        self.before = {number: signal.signal(number, catch) for number in self.signals}

    def close(self) -> None:
        """Restore the previous handlers."""
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)
