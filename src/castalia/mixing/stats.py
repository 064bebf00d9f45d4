"""What a training step tells a mixer."""

import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import TrainingError


@dataclass
class Stats:
    """Sums over one optimizer step and all processes; K sources, in the order of the mixer's `sources`.

    Every process must hand its mixer the same numbers: reduce first. A source without a row has 0 and 0. A skipped
    step (overflow) is a Stats whose tokens are all 0.
    """

    step: int
    """Number of the step, counted from 1: the first batch is step 1."""
    loss_sum: ArrayLike
    """(K,) summed cross-entropy in nats, without auxiliary terms."""
    tokens: ArrayLike
    """(K,) target tokens in that sum."""
    val_loss: ArrayLike | None = None
    """(K,) held-out nats a token, on the steps that evaluate; for dbl and naive-validation."""
    ref_loss_sum: ArrayLike | None = None
    """(K,) the reference model's loss summed over the same tokens; for doremi."""
    excess_sum: ArrayLike | None = None
    """(K,) sum over tokens of max(loss - reference loss, 0); for doremi, exact where the two sums above are not."""

    def __post_init__(self) -> None:
        """The step as a plain number, since it goes into states."""
        try:
            self.step = operator.index(self.step)
        except TypeError:
            raise TrainingError(
                f"Stats.step: expected a whole number, 1 the first step, got {self.step!r}"
            ) from None


def vector(values: ArrayLike, count: int, what: str, step: int) -> NDArray[np.float64]:
    """One number a source as float64.

    Raises  TrainingError if there are not `count`.
    """
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise TrainingError(
            f"step {step}: Stats.{what} is {type(values).__name__} {str(values)[:60]}; expected {count} numbers, one a"
            " source, in the order of the mixer's sources"
        ) from None
    if found.shape != (count,):
        raise TrainingError(
            f"step {step}: Stats.{what} has shape {found.shape}; expected ({count},), one a source"
        )
    return found
