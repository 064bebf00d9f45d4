"""How far a job over text is: a bar with tokens a second and the time left; plain lines if not on a terminal."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from castalia.monitor import duration, quantity, size_text

EVERY_SECONDS = 30.0
"""Time between plain lines; a short job prints none."""


@contextmanager
def text_progress(verb: str, inputs: Sequence[str]) -> Iterator[Callable[[int, int], Any]]:
    """Takes bytes of the inputs that are done, and the tokens that came of them."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from castalia.corpus.inputs import list_files

    console = Console(stderr=True)
    total = sum(file.size for file in list_files(inputs)) if inputs else 0
    if not console.is_terminal:
        yield PlainLines(verb, total)
        return
    speed = TextColumn("{task.fields[rate]} tok/s")
    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        speed,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task, start, tokens = bar.add_task(verb, total=total or None, rate="-"), time.monotonic(), 0

        def advance(done: int, found: int) -> None:
            nonlocal tokens
            tokens += found
            bar.update(
                task, advance=done, rate=quantity(tokens / max(time.monotonic() - start, 1e-9))
            )

        yield advance


class PlainLines:
    """A line on stderr now and then."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb, self.total = verb, total
        self.done = self.tokens = 0
        self.start = self.told = time.monotonic()

    def __call__(self, done: int, tokens: int) -> None:
        """So many bytes of input and tokens more."""
        self.done, self.tokens = self.done + done, self.tokens + tokens
        now = time.monotonic()
        if now - self.told >= EVERY_SECONDS:
            self.told = now
            typer.echo(self.line(now - self.start), err=True)

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds."""
        left = max(self.total - self.done, 0) / max(self.done / seconds, 1e-9)
        if not self.total:
            return f"{self.verb}  {size_text(self.done)}"
        share = 100 * self.done / self.total
        return (
            f"{self.verb}  {share:.1f}%  {size_text(self.done)} of {size_text(self.total)}"
            f"  tok/s {quantity(self.tokens / seconds)}  eta {duration(left)}"
        )
