"""Losses that the library does not have, and a script that runs them on several ranks.

torchrun --nproc-per-node 2 tests/seams/toy_losses.py TOKENS FOLDER
"""

import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.core.errors import TrainingError
from castalia.data import Batch
from castalia.distributed import World
from castalia.losses import LOSSES, Loss, LossConfig, LossOut, Mean, Scored
from castalia.recipes import load_config
from castalia.train.trainer import Trainer

SMALL = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "data.seq_length=64",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.steps=2",
    "train.log_every=1",
    "checkpoint.every=null",
    "checkpoint.steps=[]",
)
LAYOUTS = {"two ranks": (), "two stages": ("parallel.pp=2",), "tp": ("parallel.tp=2",)}
KINDS = {
    "tail": (),
    "preference": (),
    "lying": (),
    "reward": ("loss.center=0.1",),
    "reward before each target": ("loss.at=targets", "loss.z_loss=0.1"),
}
"""Options of each loss; its name is the first word."""


def options_of(kind: str, tokens: str) -> list[str]:
    """A loss with its options, and the rows that it reads."""
    options = [f"loss.kind={kind.split()[0]}", *KINDS[kind]]
    if not kind.startswith("reward"):
        return [*options, f"data.train={tokens}"]
    pairs = [f"data.chosen={tokens}", f"data.rejected={tokens}_rejected", "data.packing=unpacked"]
    return [*options, *pairs, "model.head=score"]


@LOSSES.register("tail")
class Tail(Loss):
    """Cross-entropy of the last targets of each row, over their number, with two metrics."""

    names = ("squared", "worst")

    class Config(LossConfig):
        """Which targets."""

        kind: Literal["tail"] = "tail"
        last: int = 16
        """Targets at the end of each row."""

    def weight(self, batch: Batch) -> float:
        return len(batch.labels) * self.config.last

    def losses(self, scored: Scored, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.labels.clone()
        labels[:, : -self.config.last] = -100
        total, losses_BT = scored.losses(labels)
        return total, losses_BT[:, -self.config.last :]

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        total, losses_BT = self.losses(scored, batch)
        metrics = {
            "squared": Mean(losses_BT.double().square().sum(), losses_BT.numel()),
            "worst": Mean(losses_BT.double().amax(1).sum(), len(losses_BT)),
        }
        return LossOut(total, losses_BT.numel(), metrics=metrics)


@LOSSES.register("tail-by-source")
class TailBySource(Tail):
    """The same, with sums by source."""

    by_source = True

    class Config(Tail.Config):
        """As for tail."""

        kind: Literal["tail-by-source"] = "tail-by-source"

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        total, losses_BT = self.losses(scored, batch)
        sums = losses_BT.sum(1, dtype=torch.float64)
        pairs = torch.stack([sums, torch.full_like(sums, self.config.last)], dim=1)
        per_source = torch.zeros(self.sources, 2, dtype=torch.float64)
        per_source.index_add_(0, batch.source.long(), pairs)
        zero = Mean(sums.sum(), len(sums))
        metrics = {"squared": zero, "worst": zero}
        return LossOut(total, losses_BT.numel(), per_source, metrics)


@LOSSES.register("lying")
class Lying(Tail):
    """Declares all targets and divides by the last ones: what the loop used to believe."""

    class Config(Tail.Config):
        """As for tail."""

        kind: Literal["lying"] = "lying"

    def weight(self, batch: Batch) -> float:
        return batch.targets


@LOSSES.register("preference")
class Preference(Loss):
    """Rows 2n and 2n + 1 are a pair of which the first is preferred: DPO without a reference."""

    whole_rows = True
    beta = 0.02

    class Config(LossConfig):
        """No options."""

        kind: Literal["preference"] = "preference"

    def weight(self, batch: Batch) -> float:
        return len(batch.labels) // 2

    def of_rows(self, negative_log_p: Tensor) -> Tensor:
        chosen, rejected = (-negative_log_p).view(-1, 2).unbind(1)
        return -F.logsigmoid(self.beta * (chosen - rejected)).sum()

    def __call__(self, scored: Scored, batch: Batch) -> LossOut:
        with torch.no_grad():
            _, losses_BT = scored.losses(batch.labels)
        with torch.enable_grad():
            rows = losses_BT.sum(1).requires_grad_()
            loss = self.of_rows(rows)
            (slope,) = torch.autograd.grad(loss, rows)
        weights = slope[:, None].expand_as(batch.labels)
        total, _ = scored.losses(batch.labels, weights)
        # The value of the loss, the gradient of the weighted sum.
        return LossOut(loss.detach() + total - total.detach(), len(rows) // 2)


def one_step(world: World, *overrides: str) -> dict[str, Any]:
    """Loss, metrics and gradients of the first batch; the error if there is one."""
    trainer = Trainer(load_config([*SMALL, *overrides]), world)
    try:
        totals = trainer.accumulate(next(trainer.training_batches()))
    except TrainingError as error:
        return {"error": str(error)}
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        gradients[name] = gradient.flatten().tolist()
    return {
        "loss": totals.loss,
        "weight": totals.weight,
        "tokens": totals.tokens,
        "metrics": totals.metrics,
        "gradients": gradients,
    }


def main(tokens: str, folder: str) -> dict[str, dict[str, Any]]:
    """Every loss in every layout."""
    results: dict[str, dict[str, Any]] = {}
    for layout, overrides in LAYOUTS.items():
        base = [f"output={folder}/run", *overrides]
        world = World.start(load_config([*SMALL, *base]).parallel, "cpu")
        results[layout] = {
            kind: one_step(world, *base, *options_of(kind, tokens)) for kind in KINDS
        }
    return results


if __name__ == "__main__":
    # As a module of the tests, so that the losses are registered once and pickled by one name.
    from tests.seams.ranks import report

    report(main(*sys.argv[1:]))
