"""The seam through which a row is changed as it is served; `castalia.interventions` has the
changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from castalia.data.labels import IGNORED
from castalia.data.span_table import DocumentSpan


@dataclass(frozen=True)
class ServedRow:
    """A row as it is served, of n = seq_length + 1 tokens."""

    tokens: NDArray[np.int64]
    """(n,)."""
    spans: Sequence[DocumentSpan]
    """The documents in it, in order; of a changed row their lengths are those of the new tokens."""
    ignored: NDArray[np.bool_] | None = None
    """(n,) tokens that are no targets, because a change put them there; None for none."""
    origin: NDArray[np.int64] | None = None
    """(n,) the place in the unchanged row that each token stands for; None for an unchanged row."""

    def moved(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the tokens of the unchanged row, (n,), as those of this one."""
        return values if self.origin is None else values[self.origin]

    def labels(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels of the unchanged row, (n,), each its token or IGNORED, as those of this one."""
        return np.where(self.moved(labels) >= 0, self.tokens, IGNORED)


class RowChange(Protocol):
    """Changes rows; a pure function of the row, its source and its place in the order."""

    def reaches(self, place: int) -> bool:
        """Whether it may change the row at a place."""

    def __call__(self, row: ServedRow, source: int, place: int) -> ServedRow:
        """The row of a source served at a place; the very same object where nothing changes."""
