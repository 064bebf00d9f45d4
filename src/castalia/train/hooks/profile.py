"""The steps of `profile.steps`, recorded operation by operation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from castalia.core.errors import CastaliaError
from castalia.distributed import World
from castalia.distributed.pipeline import Stages
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.events import warn
from castalia.train.progress import Progress
from castalia.train.stopping import say

if TYPE_CHECKING:
    from castalia.monitor.profiler.recorder import Recorder


class Profile(Hook):
    """Records each window of `profile.steps` on the ranks of `profile.ranks`.

    It is the last hook: a step that is recorded includes the hooks of the others. A window that a
    stop, a failure or a rollback cuts is written as far as it came, and says so; a run that resumes
    inside of a window records the rest of it. Nothing that goes wrong here ends a run.
    """

    recorder: "Recorder | None" = None
    window = (0, 0)

    def start(
        self, *, config: RunConfig, world: World, progress: Progress, model: Any, watchdog: Any
    ) -> None:
        """Begin at once if the next step is in a window."""
        self.config = config.profile
        self.world = world
        self.watchdog = watchdog
        self.roots: list[nn.Module] = list(model) if isinstance(model, Stages) else [model]
        self.folder = Path(config.output) / "profile"
        self.step = progress.step
        ranks = self.config.ranks
        self.here = ranks is None or world.rank in ranks
        beyond = [window for window in self.config.steps if window[0] > config.train.steps]
        if beyond and world.leads:
            first, last = beyond[0]
            warn(
                f"profile.steps {first}:{last} is never reached: the run ends at train.steps"
                f" {config.train.steps}"
            )
        if self.config.nsys and self.config.steps and world.device.type != "cuda" and world.leads:
            warn(
                "profile.nsys: nsys records GPUs, and this run has none; a trace is written instead"
            )
        self.begin(progress.step + 1)

    def begin(self, step: int) -> None:
        """Record from `step` on, if it is in a window."""
        window = next((w for w in self.config.steps if w[0] <= step <= w[1]), None)
        if window is None or not self.here:
            return
        # Imported for a run that records alone.
        from castalia.monitor.profiler.recorder import Recorder

        recorder = Recorder(self.config, self.folder, self.world.rank, self.world.device)
        try:
            recorder.begin(step, self.roots)
        except RuntimeError as error:
            warn(f"profile.steps {window[0]}:{window[1]} is not recorded: {error}")
            return
        self.recorder = recorder
        self.window = window
        if step > window[0] and self.world.leads:
            say(f"profile: steps {window[0]} to {window[1]} are recorded from step {step} on")

    def after_step(self, step: Step) -> None:
        """End the window at its last step, or begin one before its first."""
        self.step = step.number
        if self.recorder is not None:
            if step.number < self.window[1]:
                if not step.last:
                    self.recorder.begin_step(step.number + 1)
                return
            self.finish()
        if not step.last:
            self.begin(step.number + 1)

    def rolled_back(self, step: int) -> None:
        """Write what a rollback cuts; the window begins again when the run comes to it."""
        self.finish("a rollback")
        self.step = step
        self.begin(step + 1)

    def close(self) -> None:
        """Write what the end of the run cuts."""
        self.finish("the end of the run")

    def finish(self, cut: str = "") -> None:
        """Stop recording and write the files; `cut` is why before the last step."""
        recorder = self.recorder
        if recorder is None:
            return
        self.recorder = None
        try:
            recorder.end()
            # Its trace is large: the other ranks wait in the next collective.
            self.watchdog.progressed()
            if self.step < recorder.first:
                # Nothing but the start of a step.
                recorder.forget()
                return
            lines = recorder.write(self.step)
        except (OSError, RuntimeError, CastaliaError) as error:
            where = f"steps {recorder.first} to {self.step} of rank {self.world.rank}"
            recorder.forget()
            warn(f"the profile of {where} is not written, and the run goes on: {error}")
            return
        if cut:
            first, last = self.window
            lines[0] += f"; {cut} cut the window {first}:{last}"
        # Each rank names its file; one table is enough.
        for line in lines if self.world.leads else lines[:1]:
            say(line)
