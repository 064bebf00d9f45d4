"""`Throttle`: bytes a second, over all threads that share it."""

import threading
import time

BURST_SECONDS = 0.25
"""What may be sent at once after a pause."""


class Throttle:
    """A token bucket: `take` returns once so many bytes may be sent.

    rate  bytes a second; None sends at once.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.lock = threading.Lock()
        self.free_at = 0.0
        """The time at which what was taken so far has been sent at the rate."""

    def take(self, nbytes: int, stopped: threading.Event | None = None) -> None:
        """Wait until `nbytes` may be sent; a `stopped` event ends the wait."""
        if self.rate is None:
            return
        with self.lock:
            now = time.monotonic()
            begin = max(self.free_at, now - BURST_SECONDS)
            self.free_at = begin + nbytes / self.rate
            wait = self.free_at - now
        if wait <= 0:
            return
        if stopped is not None:
            stopped.wait(wait)
        else:
            time.sleep(wait)
