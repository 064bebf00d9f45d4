"""Statistics of `monitor:` that a run cannot measure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castalia.runs.config import RunConfig


def statistics_problems(config: "RunConfig") -> Iterator[str]:
    """One sentence for each."""
    if config.monitor.noise_scale_every is None:
        return
    key = "monitor.noise_scale_every"
    if config.parallel.pp > 1:
        yield (
            f"{key} needs the gradient of a part of the batch, and a pipeline runs all its"
            " micro-batches at once; use parallel.pp=1 or set it to null"
        )
    if config.rows_per_place > 1:
        yield (
            f"{key} compares gradients of independent rows, and rows of loss.kind="
            f"{config.loss.kind} belong together; set it to null"
        )
    if config.train.batch_size < 2:
        yield f"{key} needs two rows in a batch; raise train.batch_size or set it to null"
