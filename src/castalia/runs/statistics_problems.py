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
    # A rank with one row has no part of its rows. Where dp_shard is open, one rank is assumed.
    ranks = config.parallel.dp_replicate * (config.parallel.dp_shard or 1)
    if config.train.batch_size < 2 * ranks:
        yield (
            f"{key} needs two rows for each data-parallel rank; raise train.batch_size to"
            f" {2 * ranks} or set it to null"
        )
