"""Tasks and samples while a run trains, and the rows of its results table."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from castalia.checkpoint import SavePolicy
from castalia.data import RunRows
from castalia.distributed import Watchdog, World
from castalia.monitor import duration
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.hooks.validate import bytes_per_token
from castalia.train.mixture import PlannedMixture, StaticBlend
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints
from castalia.train.validation_rows import ValidationRows, keeps_validations

# What evaluates is imported by the runs that do: it loads inference.
if TYPE_CHECKING:
    from castalia.eval.work import Work
    from castalia.train.evaluation import RunEvaluation

FLUSH_SECONDS = 60.0
"""Between two writes of the rows of validations, which may come at every step."""


class Evaluate(Hook):
    """What the section `eval` of the config asks for: tasks and samples at some steps.

    `eval/TASK/METRIC` and `eval_seconds` are in the metrics of the step, the rows in
    evals/results.parquet, the samples in samples/samples.json. The run goes on as if nothing had
    been evaluated, also where a task fails. An evaluation that a request to stop breaks off is made
    up for when the run resumes.
    """

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.is_open = False
        self.evaluation: RunEvaluation | None = None

    def open(self, config: RunConfig, world: World) -> None:
        """Find the tasks and their data, before anything of the run is built.

        Raises  ConfigError or DataError as `open_tasks_of`.
        """
        if config.eval.tasks:
            from castalia.train.evaluated import open_tasks_of

            self.work = open_tasks_of(config.eval, world)
        self.is_open = True

    def start(
        self,
        *,
        config: RunConfig,
        world: World,
        rows: RunRows,
        mixture: PlannedMixture | StaticBlend,
        progress: Progress,
        checkpoints: Checkpoints,
        policy: SavePolicy,
        watchdog: Watchdog,
        is_asked: Callable[[], bool],
        stop_if_asked: Callable[[], bool],
        pending_metrics: dict[str, Any],
    ) -> None:
        """Make up for an evaluation that was broken off, and evaluate the start of a fresh run if
        that is asked for."""
        self.config = config
        self.mixture = mixture
        self.progress = progress
        self.policy = policy
        self.pending = pending_metrics
        self.flushed = time.monotonic()
        validations = None
        if keeps_validations(config, rows) and world.leads:
            validations = ValidationRows(config, rows, bytes_per_token(rows))
        if not (config.eval.evaluates or validations):
            return
        if not self.is_open:
            self.open(config, world)
        from castalia.train.evaluation import RunEvaluation

        self.evaluation = RunEvaluation(
            config=config,
            world=world,
            weights=checkpoints.own_weights,
            policy=policy,
            watchdog=watchdog,
            is_asked=is_asked,
            stop_if_asked=stop_if_asked,
            work=self.work,
            validations=validations,
        )
        fresh = checkpoints.store.latest() is None
        self.make_up()
        if config.eval.evaluates and config.eval.at_start and fresh:
            # No line of the metrics is of this step.
            self.evaluate(progress.step, {})

    def make_up(self) -> None:
        """Evaluate, if the checkpoint was saved before its evaluation was done."""
        if self.evaluation is None:
            return
        step = self.progress.step
        # Of a validation that was made up for: the line of the next step has its numbers.
        self.evaluation.take_validation(step, self.pending)
        if self.progress.evaluation_missing:
            self.evaluate(step, self.pending)

    def rolled_back(self, step: int) -> None:
        """The checkpoint may lack its evaluation."""
        self.make_up()

    def after_step(self, step: Step) -> None:
        """Evaluate when due; each time the same documents and prompts."""
        if self.evaluation is None:
            return
        every = self.config.train.eval_every
        if every and step.number % every == 0:
            self.evaluation.take_validation(step.number, step.metrics)
        if self.is_due(step.number):
            self.evaluate(step.number, step.metrics)
        late = time.monotonic() - self.flushed > FLUSH_SECONDS
        # Before a save: a resume does not repeat the validations of earlier steps.
        if late or step.last or self.policy.due(step.number):
            self.flush()

    def is_due(self, step: int) -> bool:
        """Whether there is something to evaluate after the step."""
        section = self.config.eval
        if not section.evaluates:
            return False
        ends = step == self.config.train.steps or self.mixture.at_end()
        by_steps = section.every > 0 and step % section.every == 0
        saved = section.at_saves and self.policy.due(step)
        return by_steps or saved or (section.at_end and ends)

    def evaluate(self, step: int, metrics: dict[str, Any]) -> None:
        """Evaluate, and remember in the checkpoint of this step if that was broken off."""
        assert self.evaluation is not None
        # The section may have been emptied since the checkpoint that lacks its evaluation.
        done = not self.config.eval.evaluates or self.evaluation.evaluate(step, metrics)
        self.progress.evaluation_missing = not done

    def flush(self) -> None:
        """Write the rows of validations that wait."""
        self.flushed = time.monotonic()
        if self.evaluation is not None:
            self.evaluation.flush(self.progress.step)

    def summary(self) -> str:
        """Time of the evaluations of this start; empty without one."""
        if self.evaluation is None or not self.evaluation.count:
            return ""
        count = self.evaluation.count
        plural = "" if count == 1 else "s"
        return f"{count} evaluation{plural} took {duration(self.evaluation.seconds)}"

    def close(self) -> None:
        """Write what is left."""
        self.flush()
