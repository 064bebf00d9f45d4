"""MLflow: a tracking server, or files in the run folder."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from castalia.core.extras import require
from castalia.monitor.sinks.sink import SINKS, Library, Sink, SinkConfig, flatten

PARAMETERS_AT_ONCE = 100
"""Of one request, MLflow's limit."""
LONGEST = 500
"""Characters of a parameter that every store takes."""


@SINKS.register("mlflow")
class MlflowSink(Sink):
    """One run of the tracking store for the run, however often it is resumed."""

    library = Library("mlflow", "mlflow", ("mlflow.entities",))

    class Config(SinkConfig):
        """Which store. Credentials come from MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

        kind: Literal["mlflow"] = "mlflow"
        tracking_uri: str | None = None
        """URL of a server, or sqlite:///FILE; null: MLFLOW_TRACKING_URI, or the folder mlruns in
        that of the run."""
        project: str = "castalia"
        """Experiment that the run belongs to."""
        name: str | None = None
        """Name of the run; null: that of its folder."""
        tags: dict[str, str] = {}
        """Tags by name."""

    config: Config
    client: Any = None
    is_new = False

    def start(self, step: int) -> None:
        """Begin the run, or continue it after `step`."""
        mlflow = require("mlflow", "mlflow", "monitor mlflow")
        own = (self.folder / "mlruns").absolute().as_uri()
        uri = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        if uri.startswith("file:"):
            # Otherwise newer versions refuse files, which alone need no database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.known: set[tuple[str, int]] = set()
        self.is_new = not self.exists()
        if self.is_new:
            self.create()
        else:
            self.client.update_run(self.kept["id"], status="RUNNING")
            self.note_known(step)

    def exists(self) -> bool:
        """Whether the store has the run: a folder of files may have stayed on another machine."""
        if "id" not in self.kept:
            return False
        errors = require("mlflow.exceptions", "mlflow", "monitor mlflow")
        try:
            self.client.get_run(self.kept["id"])
        except errors.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def last_step(self) -> int | None:
        """None for a run that the store has; a new one gets all steps."""
        return 0 if self.is_new else None

    def create(self) -> None:
        """A new run, with the config as its parameters."""
        found = self.client.get_experiment_by_name(self.config.project)
        if found is not None:
            experiment = found.experiment_id
        else:
            experiment = self.client.create_experiment(self.config.project)
        name = self.config.name or self.about.name
        run = self.client.create_run(experiment, run_name=name, tags=self.config.tags or None)
        self.kept["id"] = run.info.run_id
        entities = require("mlflow.entities", "mlflow", "monitor mlflow")
        parameters = [
            entities.Param(name.replace("/", "."), str(value)[:LONGEST])
            for name, value in flatten(self.about.config).items()
        ]
        for first in range(0, len(parameters), PARAMETERS_AT_ONCE):
            some = parameters[first : first + PARAMETERS_AT_ONCE]
            self.client.log_batch(self.kept["id"], params=some)
        self.client.log_dict(self.kept["id"], dict(self.about.environment), "environment.json")

    def note_known(self, step: int) -> None:
        """Ask which numbers the store has beyond `step`: a killed run may have sent more than it
        could note, and MLflow keeps two values of one step as two points."""
        for name in self.client.get_run(self.kept["id"]).data.metrics:
            for point in self.client.get_metric_history(self.kept["id"], name):
                if point.step > step:
                    self.known.add((name, point.step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One point of each number."""
        entities = require("mlflow.entities", "mlflow", "monitor mlflow")
        now = int(time.time() * 1000)
        points = [
            entities.Metric(name, value, now, step)
            for name, value in metrics.items()
            if (name, step) not in self.known
        ]
        self.client.log_batch(self.kept["id"], metrics=points)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table among the artifacts, in the form that MLflow shows."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        table = {"columns": columns, "data": data}
        self.client.log_dict(self.kept["id"], table, f"{name}/step-{step}.json")

    def file(self, path: Path) -> None:
        """An artifact."""
        self.client.log_artifact(self.kept["id"], str(path))

    def close(self) -> None:
        """Mark the run as finished."""
        if self.client is not None:
            self.client.set_terminated(self.kept["id"])
            self.client = None
