"""The numbers of each step, to every sink."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from castalia.distributed import World
from castalia.monitor.sinks import JsonlSink, Sink, make_sinks
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.events import warn
from castalia.train.mixture import PlannedMixture, StaticBlend
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints


class Metrics(Hook):
    """metrics.jsonl, one object a step, and the sinks that config.monitor names.

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
            self.sinks = make_sinks(config.monitor.sinks, Path(config.output))
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
        for file in self.files:
            file.least = self.logs.least(file.path.name)
        for sink in self.sinks:
            sink.start(step)
        for file in self.files:
            for text in file.told:
                warn(text)

    def rolled_back(self, step: int) -> None:
        """Continue after the checkpoint's step."""
        # Closed and opened again: only then does the file drop the steps that run again.
        self.close()
        self.begin(step)

    def after_step(self, step: Step) -> None:
        """Write the step."""
        for sink in self.sinks:
            sink.take(step.number, step.metrics)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            sink.close()
