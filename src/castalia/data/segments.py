"""Documents apart within a row: which token belongs to which, and its place there. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castalia.data.packed import Span


@dataclass(frozen=True)
class DocumentMask:
    """How the documents of a row are told apart.

    `eod_id` None goes by the stretches of documents that the order put into the row; an id goes by the tokens, each
    of which ends a document, and serves rows whose documents are not known any more.
    """

    eod_id: int | None = None

    def segments(self, row: NDArray[np.int64], pieces: Sequence[Span]) -> NDArray[np.int64]:
        """Number of the document in the row for each token: row (n,) -> (n,), from 0; what lies after
        all pieces is one more.

        A document that the row has twice, one after the other, is two.
        """
        if self.eod_id is not None:
            ends = np.cumsum(row == self.eod_id)
            return np.concatenate(([0], ends[:-1]))
        lengths = [piece.length for piece in pieces]
        lengths.append(len(row) - sum(lengths))
        return np.repeat(np.arange(len(lengths)), lengths)


def places_within(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each token in its stretch of equal segments, (B, n) -> (B, n), from 0."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.ones(segments.shape, np.bool_)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
