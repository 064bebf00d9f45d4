"""The interface of what reads windows of rows in a model: greedy choices, and losses of labels."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Losses = NDArray[np.float32]

NEAR = 1e-3
"""Two largest logits that differ by less are a near tie: the rounding of float32 may decide it.
Engines that sum in another order differ by up to about 1e-4. In fewer bits rounding is coarser."""


class Choices(NamedTuple):
    """What a model makes of the tokens that were read, S sequences of W places each."""

    best: Ids
    """(S, W) the id of the largest logit after each token, the lowest among equals."""
    near: NDArray[np.bool_]
    """(S, W) whether the second largest logit is less than NEAR below."""
    losses: Losses | None
    """(S, W) cross-entropy of the labels in nats, over the padded vocabulary as in training; None
    without labels."""


class Reader(ABC):
    """Sequences of one model that are read together, each cut back to any of its prefixes.

    `rewinds` False: the state of the model cannot be cut back, so a call reads all sequences, at
    one place, behind what the last call read.
    """

    rewinds: bool = True
    rows_at_once: int
    """Sequences that are best read together."""

    @abstractmethod
    def open(self, count: int, length: int) -> None:
        """Begin with `count` empty sequences of at most `length` tokens; the old ones are gone."""

    @abstractmethod
    def read(
        self,
        slots: Ids,
        starts: Ids,
        tokens: Ids,
        first: int,
        labels: Ids | None = None,
    ) -> Choices:
        """Cut sequences slots[i] back to starts[i] tokens, and append tokens[i] to each.

        Shapes  slots (S,), ascending; starts (S,); tokens (S, T) -> choices (S, T - first) after
                tokens[:, first:]; labels (S, T - first) are the ids whose loss is asked for.
        """
