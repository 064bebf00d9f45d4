"""Trackio: W&B's interface on a local SQLite file, which `trackio show` draws."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from castalia.core.extras import require
from castalia.monitor.sinks.sink import SINKS, Library, Sink, SinkConfig

RENAMED = {"time": "wall_time"}
"""Names that Trackio has for itself."""


@SINKS.register("trackio")
class TrackioSink(Sink):
    """One run of Trackio's folder, TRACKIO_DIR, however often it is resumed."""

    library = Library("trackio", "trackio", ("plotly.basedatatypes",))

    class Config(SinkConfig):
        """Where the run is shown. With a Space the token comes from HF_TOKEN."""

        kind: Literal["trackio"] = "trackio"
        project: str = "castalia"
        """Project of the run."""
        group: str | None = None
        """Group of runs that belong together."""
        name: str | None = None
        """Name of the run; null: that of its folder."""
        space: str | None = None
        """Hugging Face Space, USER/NAME, that shows the runs; null: this machine alone."""

    config: Config
    remote: Any = None

    def __init__(self, config: SinkConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.tables: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin the run, or continue it."""
        if self.remote is not None:
            return
        trackio = require("trackio", "trackio", "monitor trackio")
        config = {**self.about.config, "environment": dict(self.about.environment)}
        name = self.config.name or self.about.name
        identity = self.kept.setdefault("id", uuid.uuid4().hex)
        if self.config.space is not None:
            # There runs are told apart by their names alone.
            self.remote = trackio.init(
                project=self.config.project,
                name=f"{name}-{identity[:6]}",
                group=self.config.group,
                space_id=self.config.space,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            return
        # Not `init`, which prints lines between those of the run and is one for the process.
        run = require("trackio.run", "trackio", "monitor trackio")
        self.remote = run.Run(
            url=None,
            project=self.config.project,
            client=None,
            name=name,
            run_id=identity,
            group=self.config.group,
            config=config,
            existing_runs=[],
        )

    def last_step(self) -> int | None:
        """The last step in the SQLite file: rows are written twice a second, by a thread of
        Trackio's own, of which a killed process loses some."""
        if self.config.space is not None:
            return None
        storage = require("trackio.sqlite_storage", "trackio", "monitor trackio").SQLiteStorage
        last = storage.get_max_step_for_run(
            self.config.project, self.remote.name, run_id=self.kept["id"]
        )
        return 0 if last is None else int(last)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row."""
        row = {RENAMED.get(name, name): value for name, value in metrics.items()}
        self.remote.log({**row, **self.tables}, step=step)
        self.tables = {}

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, which waits for the numbers of its step: a row that a killed process wrote must
        be whole, since its step is not sent again."""
        trackio = require("trackio", "trackio", "monitor trackio")
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self.tables[name] = trackio.Table(columns=columns, data=data)

    def close(self) -> None:
        """Write what is left."""
        if self.remote is not None:
            self.remote.finish()
            self.remote = None
