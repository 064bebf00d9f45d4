"""The stage before the passes of a loss that compares with the divergence from its reference: of
prompts with the answers to others, over a whole step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from castalia.data import Batch
from castalia.losses.kto import SumOfRatios
from castalia.train.passes import make_passes

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


class Divergence:
    """Turns rows with their mismatched ones into rows with `Batch.baseline`.

    The estimate is one number for the step, max(0, mean log-ratio), over all ranks: every rank and
    every micro-batch compares with the same.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.world = trainer.world
        self.passes = make_passes(
            trainer.model,
            SumOfRatios(),
            trainer.config,
            trainer.world,
            trainer.watchdog.progressed,
        )
        # A live reference fills in these rows as well.
        self.passes.reference = trainer.passes.reference

    def train_batches(
        self, micro_batches: Sequence[Batch], step: int, metrics: dict[str, Any]
    ) -> list[Batch]:
        """The rows of step `step`, counted from 0."""
        length = self.trainer.curriculum.length(step + 1)
        self.passes.set_shape(self.trainer.config.train.batches.size(step), length)
        return self.compared([batch.shortened(length) for batch in micro_batches])

    def valid_batches(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The rows of a batch of a validation."""
        config = self.trainer.config
        self.passes.set_shape(config.train.batch_size, config.data.seq_length)
        return self.compared(micro_batches)

    def compared(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The rows themselves, without the mismatched ones that stood beside them."""
        baseline = self.estimate([batch.every(1, 2) for batch in micro_batches])
        return [
            replace(batch, baseline=baseline.expand(len(batch.tokens)))
            for batch in (both.every(0, 2) for both in micro_batches)
        ]

    def estimate(self, mismatched: list[Batch]) -> Tensor:
        """The divergence of all ranks' rows, a float32 scalar."""
        sums = self.passes.run(mismatched, self.passes.weights(mismatched))
        pair = torch.stack([sums.total, torch.tensor(sums.weight).to(sums.total)])
        total, weight = self.world.sum(pair).cpu().unbind()
        return (total / weight.clamp(min=1.0)).clamp(min=0.0).float()
