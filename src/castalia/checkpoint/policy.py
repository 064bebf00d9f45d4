"""Which steps are saved, and which checkpoints may go."""

from collections.abc import Iterable

from castalia.checkpoint.config import CheckpointConfig


class SavePolicy:
    """The union of a list of steps, every k-th step, and the last one; and the newest `keep` of them stay.

    Source  Biderman et al. 2023 (arXiv:2304.01373): 0, 1, 2, 4, ..., 512 and every 1000th of 143,000 steps make 154.
    """

    def __init__(self, config: CheckpointConfig, last_step: int) -> None:
        self.listed = frozenset(config.steps)
        self.every = config.every
        self.keep = config.keep
        self.last_step = last_step

    def due(self, step: int) -> bool:
        """Whether to save after optimizer step `step`; step 0, the start weights, only when it is listed."""
        regular = self.every is not None and step > 0 and step % self.every == 0
        return step in self.listed or regular or step == self.last_step

    def all_steps(self) -> list[int]:
        """Each step that a whole run saves, in order."""
        regular = range(self.every, self.last_step + 1, self.every) if self.every else ()
        listed = (step for step in self.listed if step <= self.last_step)
        return sorted({*listed, *regular, self.last_step})

    def expired(self, steps: Iterable[int]) -> list[int]:
        """Of the complete checkpoints `steps`, those to delete: neither listed nor among the newest `keep` others."""
        if self.keep is None:
            return []
        return sorted(step for step in steps if step not in self.listed)[: -self.keep]
