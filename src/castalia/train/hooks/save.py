"""Checkpoints by the save policy."""

from contextlib import suppress
from typing import Any

from castalia.checkpoint import SavePolicy
from castalia.core.errors import CheckpointError
from castalia.distributed import is_loss
from castalia.runs.config import RunConfig
from castalia.runs.hook import Hook, Step
from castalia.train.progress import Progress
from castalia.train.resume import Checkpoints

PATIENCE = 1.0
"""Seconds that the save in progress waits for a lost rank to write its part."""


class Save(Hook):
    """Checkpoints by the save policy, and one at the end or when the run is asked to stop."""

    checkpoints: Checkpoints | None = None
    is_lost = False
    reported = 0

    def start(
        self,
        *,
        config: RunConfig,
        progress: Progress,
        policy: SavePolicy,
        checkpoints: Checkpoints,
        pending_metrics: dict[str, Any],
    ) -> None:
        """Save the start of a fresh run if the policy has it, or if the run may roll back to it."""
        self.checkpoints = checkpoints
        self.policy = policy
        self.pending = pending_metrics
        self.asynchronous = config.checkpoint.asynchronous
        # Without it a NaN before the first checkpoint would have nowhere to return to.
        may_roll_back = "rollback" in (config.guard.nan, config.guard.spike)
        # Step 0, or with train.start_step the step of the start.
        first = progress.step
        if checkpoints.store.latest() is None and (policy.due(first) or may_roll_back):
            self.save(first)

    def after_step(self, step: Step) -> None:
        """Save when due."""
        assert self.checkpoints is not None
        written = self.checkpoints.written
        if len(written) > self.reported:
            # The writing ends some steps after the save began, so its time goes to the next line.
            self.reported = len(written)
            self.pending["save_seconds"] = round(written[-1], 4)
        # A last step without a checkpoint would be lost work, whatever the policy.
        if self.policy.due(step.number) or step.last:
            self.save(step.number)

    def save(self, step: int) -> None:
        """Stage the state and continue; the writing happens in the background."""
        assert self.checkpoints is not None
        timing = self.checkpoints.save(step, asynchronous=self.asynchronous)
        self.pending["save_stall_seconds"] = round(timing.stall_seconds, 4)

    def on_error(self, error: BaseException) -> None:
        """Without a lost rank, a save can only finish if that rank has already written its part."""
        self.is_lost = is_loss(error)
        if self.is_lost and self.checkpoints:
            self.checkpoints.hurry(PATIENCE)

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if self.checkpoints is None:
            return
        # After a lost rank the failed save is a consequence: report the lost rank, not this.
        with suppress(*[CheckpointError] if self.is_lost else []):
            self.checkpoints.wait()
