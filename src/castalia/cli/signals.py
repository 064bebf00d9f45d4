"""Jobs that are told to stop: what is under way ends in order, and a sentence says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from castalia.core.errors import CastaliaError

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class StoppedError(CastaliaError):
    """The job was told to stop. The exit status is 128 and the signal's number, as of a shell."""

    def __init__(self, number: int, remedy: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.exit_code = 128 + number


@contextmanager
def stoppable(remedy: str) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a terminal that closes end what is inside, through every `finally`.

    Once: what comes while it ends is not heard. A signal that is ignored, as under nohup, stays so.
    Raises  StoppedError with `remedy`.
    """
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(came[0] if came else signal.SIGINT, remedy) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
