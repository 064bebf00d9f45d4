"""`Stats`: the losses of a training step by source, a mixer's input."""

import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import TrainingError


@dataclass
class Stats:
    """Sums over one optimizer step and all ranks, for K sources in the order of `mixer.sources`.

    Every rank must pass the same numbers, so all-reduce first. A source without rows has loss 0 and
    0 tokens. A skipped step, such as an fp16 overflow, has 0 tokens everywhere.
    """

    step: int
    """Number of the step, starting at 1."""
    loss_sum: ArrayLike
    """(K,) summed cross-entropy in nats, without auxiliary terms."""
    tokens: ArrayLike
    """(K,) target tokens in `loss_sum`."""
    val_loss: ArrayLike | None = None
    """(K,) held-out loss in nats a token, on steps with an evaluation; for dbl and
    naive-validation."""
    ref_loss_sum: ArrayLike | None = None
    """(K,) a reference model's loss summed over the same tokens; for doremi."""
    excess_sum: ArrayLike | None = None
    """(K,) sum over tokens of max(loss - reference loss, 0); for doremi, whose formula it is. The
    difference of the two sums above is a lower bound."""

    def __post_init__(self) -> None:
        """Convert the step to int, because it goes into JSON states."""
        try:
            self.step = operator.index(self.step)
        except TypeError:
            raise TrainingError(
                f"Stats.step: expected an integer, 1 for the first step, got {self.step!r}"
            ) from None


def vector(values: ArrayLike, count: int, what: str, step: int) -> NDArray[np.float64]:
    """One field of a Stats as (count,) float64.

    Raises  TrainingError unless it holds `count` numbers.
    """
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TrainingError(
            f"step {step}: Stats.{what} is {type(values).__name__} {str(values)[:60]}; expected"
            f" {count} numbers, one per source, in the order of the mixer's sources"
        ) from None
    if numbers.shape != (count,):
        raise TrainingError(
            f"step {step}: Stats.{what} has shape {numbers.shape}; expected ({count},), one number"
            " per source"
        )
    return numbers
