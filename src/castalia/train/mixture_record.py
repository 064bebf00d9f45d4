"""mixture.jsonl: what the planner of a run did, step by step."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from castalia.mixing import MixtureLog, Watch, read_mixture
from castalia.train.hooks import Hook

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


class RecordMixture(Hook):
    """mixture.jsonl: the weights, rows and losses of each step, enough to replay them."""

    log: MixtureLog | None = None

    def start(self, trainer: "Trainer") -> None:
        """Open the file; steps that will run again are dropped from it."""
        mixture = trainer.mixture
        if mixture is None or not trainer.world.leads:
            return
        path = Path(trainer.config.output) / "mixture.jsonl"
        self.watch = Watch(mixture.planner.sources, mixture.planner.mixer.prior)
        set_aside(path, mixture.planner.sources, mixture.done)
        self.log = MixtureLog(
            path, mixture.planner, every=mixture.config.log_every, resume_step=mixture.done
        )

    def rolled_back(self, trainer: "Trainer") -> None:
        """Drop the steps that will run again."""
        self.start(trainer)

    def after_step(self, trainer: "Trainer") -> None:
        """Append the step, and tell what happened to a source."""
        mixture = trainer.mixture
        if self.log and mixture and mixture.plan and mixture.stats:
            said = self.watch.observe(mixture.plan.weights, mixture.stats)
            for event in (*mixture.plan.events, *said):
                print(f"castalia: step {mixture.done}: {event}", file=sys.stderr, flush=True)
            self.log.write(mixture.plan, mixture.stats)

    def close(self, trainer: "Trainer") -> None:
        """Write what is left."""
        if self.log:
            self.log.close()


def set_aside(path: Path, sources: Sequence[str], step: int) -> None:
    """Rename the record of a run that went on with other sources: one record has one list of sources."""
    if step and path.exists() and read_mixture(path).sources != list(sources):
        path.rename(path.with_name(f"mixture-to-step-{step:08d}.jsonl"))
