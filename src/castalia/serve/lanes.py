"""Work beside the event loop: short and long in threads of their own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

R = TypeVar("R")
SHORT_THREADS = 2
LONG = 1 << 16
"""Size from which work is long: bytes of a body, characters of a text, entries of an answer."""


class Lanes:
    """Threads for what takes longer than the event loop may pause.

    Long work takes its turn in one thread: Python runs one thread at a time and changes every 5 ms,
    so each further one would delay the event loop by as much, and memory is that of one. Short
    work does not wait for it.
    """

    def __init__(self) -> None:
        self.short = ThreadPoolExecutor(SHORT_THREADS, "castalia-short")
        self.long = ThreadPoolExecutor(1, "castalia-long")

    async def run(self, size: int, work: Callable[..., R], *args: Any, **options: Any) -> R:
        """The result of `work`, whose time grows with `size`."""
        executor = self.long if size >= LONG else self.short
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, partial(work, *args, **options))

    def close(self) -> None:
        """Begin nothing more."""
        self.short.shutdown(wait=False, cancel_futures=True)
        self.long.shutdown(wait=False, cancel_futures=True)
