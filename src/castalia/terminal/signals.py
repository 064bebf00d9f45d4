"""Jobs that are stopped by a signal: they end in order, and a sentence says how to continue."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from castalia.core.errors import CastaliaError

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class StoppedError(CastaliaError):
    """A signal stopped the job. The exit status is 128 + the signal's number, as in a shell."""

    def __init__(self, number: int, remedy: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.exit_code = 128 + number


@contextmanager
def stoppable(remedy: str) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closing terminal end the block, through every `finally`.

    Only the first signal counts; later ones are ignored while the block ends. An ignored signal, as
    under nohup, stays ignored.
    Raises  StoppedError with `remedy`.
    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    # SIGHUP does not exist on Windows.
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Without a signal of ours it was raised by hand, as tests do.
        raise StoppedError((received or [signal.SIGINT])[0], remedy) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
