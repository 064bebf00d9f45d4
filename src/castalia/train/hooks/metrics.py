"""The numbers of each step, to every sink."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from castalia.core.files import read_json
from castalia.distributed import World
from castalia.monitor.sinks import About, JsonlSink, Sink, close_sinks, make_sinks
from castalia.runs.config import RunConfig
from castalia.runs.folder import HASHES, RECORD
from castalia.runs.hook import Hook, Step
from castalia.train.events import warn
from castalia.train.mixture import PlannedMixture, StaticBlend
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints


class Metrics(Hook):
    """metrics.jsonl, one object a step, and the sinks that config.monitor names, on rank 0.

    A validation or evaluation of the last step that was made up for has no next step: its numbers
    are added to the line of its own.
    """

    sinks: list[Sink] = []

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        progress: Progress,
        mixture: PlannedMixture | StaticBlend,
        checkpoints: Checkpoints,
        pending_metrics: Mapping[str, Any],
    ) -> None:
        """Open the sinks. Those that can drop the steps that will run again do so."""
        self.logs = checkpoints.logs
        # Every rank has the same numbers; one writes them.
        if world.leads:
            folder = Path(config.output)
            self.sinks = make_sinks(config.monitor.sinks, folder, about(config, folder), warn)
            for file in self.files:
                self.logs.add(partial(getattr, file, "log"))
        self.begin(progress.step)
        made_up = {
            name: value
            for name, value in pending_metrics.items()
            if name.startswith(("valid", "eval"))
        }
        if made_up and (mixture.at_end() or progress.step >= config.train.steps):
            for sink in self.sinks:
                sink.amend(progress.step, made_up)

    @property
    def files(self) -> list[JsonlSink]:
        """The sinks that are metrics.jsonl: one on the leading rank."""
        return [sink for sink in self.sinks if isinstance(sink, JsonlSink)]

    def begin(self, step: int) -> None:
        """Continue every sink after `step`, and say what was wrong with the lines before it."""
        self.set_least()
        for sink in self.sinks:
            sink.start(step)
        self.warn_of_damage()

    def set_least(self) -> None:
        """Let the file know how far the checkpoint relies on it."""
        for file in self.files:
            file.least = self.logs.least(file.path.name)

    def warn_of_damage(self) -> None:
        """Say what was wrong with the lines of the file."""
        for file in self.files:
            for text in file.told:
                warn(text)

    def rolled_back(self, step: int) -> None:
        """Continue after the checkpoint's step."""
        self.set_least()
        # The file is the first: the others follow it, and it drops the steps that run again.
        for sink in self.sinks:
            sink.restart(step)
        self.warn_of_damage()

    def after_step(self, step: Step) -> None:
        """Write the step."""
        for sink in self.sinks:
            sink.take(step.number, step.metrics)

    def close(self) -> None:
        """Close the sinks; those that are behind get the time that the config grants."""
        close_sinks(self.sinks)


def about(config: RunConfig, folder: Path) -> About:
    """What services are told of a run."""
    record = folder / RECORD
    environment = {}
    # `castalia train` writes it; a Trainer alone does not.
    if record.is_file():
        environment = read_json(record)
        environment.pop(HASHES, None)
    return About(folder.name, config.model_dump(mode="json"), environment)
