"""Runs whose length is given in passes over the data: `train.epochs` in place of `train.steps`."""

import math

from castalia.core.errors import ConfigError
from castalia.data.run_rows import rows_of_a_pass
from castalia.runs.config import RunConfig


def with_steps(config: RunConfig) -> RunConfig:
    """The config with the `train.steps` that `train.epochs` stands for.

    A pass is rows // batch_size steps: rows that do not fill a last batch are left out, and the
    next pass begins with the first row again. Text files of fine-tuning are small, and every record
    is to be learned from: there the steps are rounded up, and a batch may hold the end of a pass
    and the beginning of the next one.

    Raises  ConfigError if a pass does not fill one batch; DataError if the files cannot be read.
    Source  GPT-NeoX, megatron/training.py, update_iterations, and its loader, which drops the last
            incomplete batch. With gradient accumulation it counts micro-batches in place of steps.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    rows = rows_of_a_pass(config.data, seed=config.order_seed)
    batch = config.train.batch_size
    if config.data.texts:
        return with_train_steps(config, math.ceil(epochs * rows / batch))
    if rows < batch:
        raise ConfigError(
            f"train.epochs: a pass has {rows} rows of {config.data.seq_length} tokens, fewer than"
            f" train.batch_size {batch}; use a smaller batch, or set train.steps and"
            " train.epochs=null"
        )
    return with_train_steps(config, epochs * (rows // batch))


def with_train_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config of a run that reads the rows of so many steps."""
    steps *= config.updates_per_rows
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
