"""How a run is asked to end before its last step, and lines that a lost reader cannot break."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import IO, Any

STDERR = 2
"""Its file descriptor."""


class Stop(IntEnum):
    """Who asked a run to end; the largest of all ranks counts, and it decides the exit status."""

    NO = 0
    POLITE = 1
    """A scheduler, or a closed terminal: exit status 0, because everything is saved."""
    UNREAD = 2
    """The reader of the output is gone: 141, as a shell reports `castalia … | head`."""
    INTERRUPTED = 3
    """Ctrl-C: 130. A caller in Python gets KeyboardInterrupt, so that no next run begins."""
    DAMAGED = 4
    """A training file is not what was written: an error, and the step is not saved."""


def due(every: int | None, step: int) -> Stop:
    """The stop of `train.exit_every`: as if a scheduler asked for it at every so many steps."""
    if every and step % every == 0:
        return Stop.POLITE
    return Stop.NO


class SignalReader:
    """Calls `receive` in a thread of its own, as soon as one of the signals arrives.

    A plain handler runs only when the main thread is back in Python, which may take a whole pass,
    or for ever where another rank does not answer. An ignored signal, as under nohup, stays
    ignored. Only the main thread of a program can catch signals; elsewhere nothing is caught.
    """

    def __init__(
        self, signals: Sequence[signal.Signals], receive: Callable[[signal.Signals], None]
    ) -> None:
        self.receive = receive
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        # Python writes the number of each signal that has a handler of Python's there.
        self.wakeup = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        # Kept, because the trainer may run inside a program with handlers of its own.
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, leave_to_the_thread)
        self.thread = threading.Thread(target=self.read, daemon=True, name="signals")
        self.thread.start()

    def read(self) -> None:
        """The thread's loop, until `close`."""
        while numbers := os.read(self.reading, 64):
            for number in numbers:
                if number in self.handlers:
                    self.receive(signal.Signals(number))

    def close(self) -> None:
        """Restore what was there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        # First, so that no signal is written to a pipe that is closed.
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            # None: the handler before was not one of Python's, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # The thread reads to the end of the pipe: a signal that is in it still counts.
        os.close(self.writing)
        self.thread.join()
        os.close(self.reading)


def leave_to_the_thread(*_: object) -> None:
    """A handler that does nothing: the wakeup descriptor has the signal already."""


def say(text: str, stream: IO[str] | None = None) -> bool:
    """Print a line on `stream`, stdout by default; False if its reader is gone.

    Ctrl-C ends `tee` at once, and a closed terminal takes no more output. The run must still be
    able to save. What stdout no longer takes goes to stderr, or nowhere.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # The descriptor itself is changed: the lost line is still in the stream's buffer.
        with open(os.devnull, "w") as nowhere:
            for target in (STDERR, nowhere.fileno()):
                os.dup2(target, stream.fileno())
                with suppress(OSError):
                    stream.flush()
                    return False
    return True
