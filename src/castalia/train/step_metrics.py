"""The line of metrics.jsonl that a step leaves."""

from typing import TYPE_CHECKING, Any

from castalia.experts.ledger import load_metrics
from castalia.monitor import memory_bytes
from castalia.train.guard import Action
from castalia.train.totals import StepTotals

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


def step_metrics(
    trainer: "Trainer", lr: float, totals: StepTotals, action: Action
) -> dict[str, Any]:
    """The step's line of metrics.jsonl."""
    metrics: dict[str, Any] = {
        "loss": totals.loss,
        "lr": lr,
        "grad_norm": totals.norm,
        "tokens": trainer.progress.tokens,
        "rows_hash": totals.rows_hash,
        **totals.metrics,
        **trainer.scale.metrics(trainer.progress.updates),
        **load_metrics(trainer.passes.balance.loads(totals.experts)),
    }
    if trainer.config.curriculum.kind != "none":
        metrics["seq_length"] = trainer.curriculum.length(trainer.progress.step)
    # One source has the loss of the step ittrainer.
    if len(trainer.rows.sources) > 1:
        metrics["sources"] = totals.of_sources(trainer.rows.sources)
    if action is Action.NO_TARGETS:
        metrics["skipped"] = action.value
    elif why := trainer.guard.skips.get(trainer.progress.step):
        metrics["skipped"] = why
    metrics |= trainer.telemetry.take()
    metrics |= trainer.clock.metrics(totals.tokens)
    # The peak of this rank; the leading one writes it.
    metrics["memory_bytes"] = memory_bytes(trainer.world.device)
    # Times of saves and loads, known only after the line of their own step was written.
    metrics |= trainer.pending_metrics
    trainer.pending_metrics.clear()
    return metrics
