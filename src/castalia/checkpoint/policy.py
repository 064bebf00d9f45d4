"""Which steps are saved, and which checkpoints are deleted."""

from collections.abc import Iterable

from castalia.checkpoint.config import CheckpointConfig


class SavePolicy:
    """Save listed steps, every k-th step and the last; keep listed steps and the newest `keep`
    others.

    Source  Biderman et al. 2023 (arXiv:2304.01373): 0, 1, 2, 4, ..., 512 and every 1000th of
            143,000 steps make 154.
    """

    def __init__(self, config: CheckpointConfig, last_step: int) -> None:
        self.listed = frozenset(config.steps)
        self.every = config.every
        self.keep = config.keep
        self.last_step = last_step

    def __repr__(self) -> str:
        return f"SavePolicy({len(self.all_steps())} checkpoints up to step {self.last_step})"

    def due(self, step: int) -> bool:
        """Whether to save after optimizer step `step`; step 0, the start weights, only if
        listed."""
        # Step 0 is a multiple of everything, but start weights are rarely worth their disk.
        regular = self.every is not None and step > 0 and step % self.every == 0
        return step in self.listed or regular or step == self.last_step

    def all_steps(self) -> list[int]:
        """Each step that a complete run saves, ascending."""
        regular = range(self.every, self.last_step + 1, self.every) if self.every else ()
        listed = (step for step in self.listed if step <= self.last_step)
        return sorted({*listed, *regular, self.last_step})

    def expired(self, steps: Iterable[int]) -> list[int]:
        """The complete checkpoints to delete: neither listed nor among the newest `keep` others."""
        if self.keep is None:
            return []
        # Listed steps are what a study compares; keep bounds the disk for all others.
        return sorted(step for step in steps if step not in self.listed)[: -self.keep]
