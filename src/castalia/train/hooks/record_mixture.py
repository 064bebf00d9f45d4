"""mixture.jsonl: every decision of a run's planner, step by step."""

import sys
from collections.abc import Sequence
from pathlib import Path

from castalia.checkpoint.find import find_checkpoint
from castalia.checkpoint.load import read_state
from castalia.core.files import atomic_write
from castalia.distributed import World
from castalia.mixing import MixtureLog, Watch
from castalia.mixing.record import read_header
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.events import warn
from castalia.train.mixture import PlannedMixture, StaticBlend
from castalia.train.mixture_copies import mend
from castalia.train.resume import Checkpoints
from castalia.train.stopping import say

FILE = "mixture.jsonl"


class RecordMixture(Hook):
    """The weights, rows and losses of each step, enough to replay them."""

    log: MixtureLog | None = None
    mixture: PlannedMixture | None = None

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        mixture: PlannedMixture | StaticBlend,
        checkpoints: Checkpoints,
    ) -> None:
        """Open the file, on the leading rank of a run with a planner."""
        if isinstance(mixture, PlannedMixture) and world.leads:
            self.mixture = mixture
            self.logs = checkpoints.logs
            self.checkpoints = checkpoints.store.folder
            self.path = Path(config.output) / FILE
            if config.train.start_step and config.model.start is not None:
                take_over(self.path, config.model.start)
            self.begin(mixture)
            self.logs.add(lambda: self.log.log if self.log else None)

    def begin(self, mixture: PlannedMixture) -> None:
        """Continue after the steps observed; later ones are dropped from the file."""
        planner = mixture.planner
        self.watch = Watch(planner.sources, planner.mixer.prior)
        # Before the log opens the file, which it would continue.
        least = self.logs.least(FILE)
        if mixture.done and (told := mend(self.path, mixture.done, least, self.checkpoints)):
            warn(told)
        set_aside(self.path, planner.sources, mixture.done)
        self.log = MixtureLog(
            self.path, planner, every=mixture.config.log_every, resume_step=mixture.done
        )

    def rolled_back(self, step: int) -> None:
        """Drop the steps that will run again."""
        if self.mixture:
            self.begin(self.mixture)

    def after_step(self, step: Step) -> None:
        """Append the step, and report events of its sources."""
        mixture = self.mixture
        if self.log and mixture and mixture.plan and mixture.stats:
            moves = self.watch.observe(mixture.plan.weights, mixture.stats)
            for event in (*mixture.plan.events, *moves):
                say(f"castalia: step {mixture.done}: {event}", sys.stderr)
            self.log.write(mixture.plan, mixture.stats)

    def close(self) -> None:
        """Write the buffered lines."""
        if self.log:
            self.log.close()


def take_over(path: Path, start: str) -> None:
    """Copy the record of the run that a branch continues, whose steps are the branch's first: the
    rows of a step follow from all choices before it. What the run chose after them is dropped when
    the log is opened."""
    if path.exists():
        return
    # checkpoints/step-00001000 in the folder of the run.
    checkpoint = find_checkpoint(start)
    before = checkpoint.parent.parent / path.name
    if before.is_file():
        with atomic_write(path, "wb") as file:
            file.write(before.read_bytes())
    # What is damaged there is restored from the copies there.
    state = read_state(checkpoint)
    least = state.get("logs", {}).get(FILE, {}).get("step")
    if told := mend(path, state["progress"]["step"], least, checkpoint.parent):
        warn(told)


def set_aside(path: Path, sources: Sequence[str], step: int) -> None:
    """Rename the record of a run that continues with other sources.

    One record has one list of sources, so the new steps need a file of their own.
    """
    if step and path.exists() and read_header(path)["sources"] != list(sources):
        path.rename(path.with_name(f"mixture-to-step-{step:08d}.jsonl"))
