"""The loss over held-out rows, while a run trains."""

from typing import TYPE_CHECKING

from castalia.data import BlendedRows
from castalia.train.totals import StepTotals

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


def evaluate(trainer: "Trainer", rows: BlendedRows, batches: int) -> StepTotals | None:
    """See `Trainer.evaluate`."""
    # A curriculum and a ramp change the batches of training alone: validations compare.
    trainer.passes.set_shape(trainer.config.train.batch_size, trainer.config.data.seq_length)
    sums = trainer.passes.new_sums()
    # From step 0 of their own order each time, so that two validations compare.
    reader = trainer.batches(rows, 0)
    with trainer.updater.evaluating():
        for _ in range(batches):
            if trainer.stop_if_asked():
                break
            with trainer.watchdog.doing("validation"):
                micro_batches = next(reader)
                if trainer.experience is not None:
                    micro_batches = trainer.experience.valid_batches(micro_batches)
                weights = trainer.passes.weights(micro_batches)
                sums.plus(trainer.passes.run(micro_batches, weights))
    if trainer.stop:
        return None
    vector = trainer.world.sum(sums.vector(0, 0))
    return StepTotals.of(
        vector,
        trainer.loss,
        f"the validation of step {trainer.progress.step}",
        len(sums.experts),
    )
