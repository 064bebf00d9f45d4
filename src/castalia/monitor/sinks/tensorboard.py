"""TensorBoard: event files, which `tensorboard --logdir runs` draws."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from castalia.monitor.sinks.sink import SINKS, Library, Sink, SinkConfig


@SINKS.register("tensorboard")
class TensorboardSink(Sink):
    """Scalars of fp32, and samples as text.

    An event file says at its beginning from which step on it replaces those before it, so that a
    step that runs again is drawn once, as it was last.
    """

    library = Library("tensorboard", "tensorboard", ("torch.utils.tensorboard.writer",))
    rewinds = True

    class Config(SinkConfig):
        """Where the event files are."""

        kind: Literal["tensorboard"] = "tensorboard"
        folder: str = "tb"
        """Folder of the event files, in that of the run; in an absolute one each run has its
        own."""

    config: Config
    writer: Any = None
    last = 0
    is_new = False

    @property
    def place(self) -> Path:
        """The folder of the event files."""
        folder = Path(self.config.folder)
        if folder.is_absolute():
            # Shared by many runs: TensorBoard would draw all files of one folder as one run.
            return folder / self.about.name
        return self.folder / folder

    def start(self, step: int) -> None:
        """Open an event file that replaces the steps after `step`."""
        self.last = step
        self.is_new = not any(self.place.glob("events.*"))
        self.open()
        if self.is_new:
            for name in ("config", "environment"):
                text = json.dumps(getattr(self.about, name), indent=1)
                self.writer.add_text(name, f"```\n{text}\n```", 0)

    def open(self) -> None:
        """A writer of the steps after the last one."""
        # Imported late: it takes half a second.
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(self.place), purge_step=self.last + 1)

    def last_step(self) -> int | None:
        """None where there are event files; elsewhere, as on another machine, all steps come."""
        return 0 if self.is_new else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One point in the chart of each number."""
        try:
            if self.writer is None:
                self.open()
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        except Exception:
            # The queue of a writer that failed once stays failed.
            self.writer = None
            raise
        self.last = step

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A text of one table in Markdown."""
        columns = list(rows[0])
        data = [[row[name] for name in columns] for row in rows]
        lines = [columns, ["---"] * len(columns), *data]
        cells = [[markdown(cell) for cell in line] for line in lines]
        text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        self.writer.add_text(name, text, step)

    def flush(self) -> bool:
        """Have the queue written."""
        try:
            if self.writer is not None:
                self.writer.flush()
        except Exception:
            self.writer = None
            raise
        return True

    def close(self) -> None:
        """End the event file."""
        writer = self.writer
        # Before the call: a writer that failed fails to close, too.
        self.writer = None
        if writer is not None:
            writer.close()


def markdown(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")
