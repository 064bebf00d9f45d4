"""Comet: https://www.comet.com, or archives that are sent later."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.extras import require
from castalia.monitor.sinks.sink import SINKS, Library, Sink, SinkConfig

QUIET = {
    # What it would take from torch by itself doubles our numbers, and patches the library.
    "log_code": False,
    "log_graph": False,
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "parse_args": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "display_summary_level": 0,
}
FOLDER = "comet"
"""Folder of the archives in that of the run."""


@SINKS.register("comet")
class CometSink(Sink):
    """One experiment for the run, however often it is resumed.

    Offline an archive is written when the run ends; a killed run leaves none, and its next start
    writes all steps that no archive has.
    """

    # It would patch torch and other libraries, and print lines of its own between those of a run.
    library = Library(
        "comet_ml",
        "comet",
        variables=(("COMET_DISABLE_AUTO_LOGGING", "1"), ("COMET_LOGGING_CONSOLE", "ERROR")),
    )

    class Config(SinkConfig):
        """Where the experiment is shown. The key comes from COMET_API_KEY or ~/.comet.config."""

        kind: Literal["comet"] = "comet"
        workspace: str | None = None
        """Workspace; null: the default of the account."""
        project: str = "castalia"
        """Project of the experiment."""
        name: str | None = None
        """Name of the experiment; null: that of the run folder."""
        tags: list[str] = []
        """Words to find the experiment by."""
        others: dict[str, Any] = {}
        """Further values that are shown with it."""
        mode: Literal["online", "offline"] | None = None
        """`offline` writes archives into comet/ in the run folder, for `comet upload`; null:
        offline if COMET_START_ONLINE is 0 or false, else online."""

    config: Config
    experiment: Any = None

    @property
    def is_offline(self) -> bool:
        """Whether nothing is sent."""
        if self.config.mode is not None:
            return self.config.mode == "offline"
        return os.environ.get("COMET_START_ONLINE", "").lower() in ("0", "false")

    def start(self, step: int) -> None:
        """Begin the experiment, or continue it."""
        if self.experiment is not None:
            return
        comet = require("comet_ml", "comet", "monitor comet")
        key = self.kept.setdefault("key", uuid.uuid4().hex)
        again = bool(self.kept.get("exists"))
        options = dict(QUIET, workspace=self.config.workspace, project_name=self.config.project)
        if self.is_offline:
            place = self.folder / FOLDER
            place.mkdir(exist_ok=True)
            options["offline_directory"] = str(place)
            kind = comet.ExistingOfflineExperiment if again else comet.OfflineExperiment
        else:
            if comet.get_api_key(None, comet.get_config()) is None:
                raise ConfigError(
                    "no key of Comet: set COMET_API_KEY, run `comet login`, or set mode: offline"
                )
            kind = comet.ExistingExperiment if again else comet.Experiment
        self.experiment = kind(experiment_key=key, **options)
        if not self.is_offline and not self.experiment.alive:
            self.experiment = None
            raise CastaliaError("Comet does not answer")
        if not again:
            self.describe()
        # Offline the experiment exists when its archive does.
        self.kept["exists"] = again or not self.is_offline

    def describe(self) -> None:
        """What is said of a run once."""
        self.experiment.set_name(self.config.name or self.about.name)
        if self.config.tags:
            self.experiment.add_tags(self.config.tags)
        self.experiment.log_others({**self.config.others, **self.about.environment})
        self.experiment.log_parameters(dict(self.about.config))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One point of each number."""
        self.experiment.log_metrics(dict(metrics), step=step)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A CSV file of `step`."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self.experiment.log_table(f"{name}-{step}.csv", tabular_data=data, headers=columns)

    def file(self, path: Path) -> None:
        """An asset of the experiment."""
        self.experiment.log_asset(str(path), file_name=path.name, overwrite=True)

    def flush(self) -> bool:
        """Wait until all is sent.

        Raises  CastaliaError if the service does not take it.
        """
        if self.is_offline:
            return False
        if not self.experiment.flush():
            raise CastaliaError("Comet did not take all of it")
        return True

    def close(self) -> None:
        """End the experiment, or write its archive."""
        if self.experiment is not None:
            self.experiment.end()
            self.experiment = None
            self.kept["exists"] = True

    def abandon(self) -> None:
        """Leave out what the library does when the process ends, which waits for an hour."""
        hook = getattr(self.experiment, "_atexit_hook", None)
        if hook is not None:
            hook.disable()
