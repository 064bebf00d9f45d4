"""Progress of bounded jobs: a bar on a terminal, elsewhere a line now and then or nothing."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from castalia.monitor.display import duration, quantity, size_text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

EVERY_SECONDS = 30.0
"""Time between plain lines; a short job prints none."""


def sizes_and_speed() -> "tuple[ProgressColumn, ProgressColumn]":
    """Columns of bytes done and of bytes a second, in the units of `size_text`."""
    from rich.progress import DownloadColumn, ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        """rich's own column counts in powers of ten, beside sizes in powers of two."""

        def render(self, task: Task) -> Text:
            """The speed of the last half minute."""
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{size_text(speed)}/s")

    return DownloadColumn(binary_units=True), Speed()


@contextmanager
def text_progress(verb: str, inputs: Sequence[str]) -> Iterator[Callable[[int, int], Any]]:
    """Progress of tokenizing `inputs`; yields a callback (bytes consumed, tokens produced)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from castalia.corpus.inputs import list_files

    total = 0
    if inputs:
        total = sum(file.size for file in list_files(inputs))
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainLines(verb, total)
        return
    columns = (
        TextColumn(verb),
        BarColumn(),
        *sizes_and_speed(),
        TextColumn("{task.fields[rate]} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(verb, total=total or None, rate="-")
        start = time.monotonic()
        tokens = 0

        def advance(consumed: int, produced: int) -> None:
            nonlocal tokens
            tokens += produced
            seconds = max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=consumed, rate=quantity(tokens / seconds))

        yield advance


class PlainLines:
    """A line on stderr every EVERY_SECONDS, for logs and pipes."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb = verb
        self.total = total
        self.consumed = 0
        self.tokens = 0
        self.start = time.monotonic()
        self.last_line = self.start

    def __call__(self, consumed: int, produced: int) -> None:
        """Count bytes consumed and tokens produced; print a line if it is time for one."""
        self.consumed += consumed
        self.tokens += produced
        now = time.monotonic()
        if now - self.last_line >= EVERY_SECONDS:
            self.last_line = now
            typer.echo(self.line(now - self.start), err=True)

    def line(self, seconds: float) -> str:
        """The progress after so many seconds."""
        if not self.total:  # a download, whose length no server has to name
            return f"{self.verb}  {size_text(self.consumed)}"
        share = 100 * self.consumed / self.total
        left = max(self.total - self.consumed, 0) / max(self.consumed / seconds, 1e-9)
        return (
            f"{self.verb}  {share:.1f}%  {size_text(self.consumed)} of {size_text(self.total)}"
            f"  tok/s {quantity(self.tokens / seconds)}  eta {duration(left)}"
        )


@contextmanager
def bytes_progress(
    verb: str, prefixes: list[str], size: int | None = None
) -> Iterator[Callable[[int], None] | None]:
    """Progress over the bytes of token files, or over `size` bytes; None if not on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from castalia.core.errors import DataError
    from castalia.data import IndexedDataset

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    total = size
    if total is None:
        # The job itself reports a broken file, with more about it.
        with suppress(DataError):
            total = sum(len(IndexedDataset(prefix).buffer) for prefix in prefixes)
    columns = (
        TextColumn(verb),
        BarColumn(),
        *sizes_and_speed(),
        TimeRemainingColumn(),
    )
    # Lines of the job go to stdout untouched: rich would send them to stderr with the bar.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def counted_progress(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress over things with names; yields a callback (name of the next, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line(name: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY_SECONDS:
                last = time.monotonic()
                typer.echo(f"{verb}  {done} of {total}  {name}", err=True)

        yield line
        return
    columns = (
        TextColumn(verb),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(verb, total=None, at="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, at=name)
