"""Documents kept apart within a row: which token belongs to which document, and its position there.
Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError
from castalia.data.config import DataConfig
from castalia.data.row_source import DocumentSpan
from castalia.data.sidecar import recorded_end
from castalia.tokenizers.tokenizer import load_tokenizer


@dataclass(frozen=True)
class DocumentMask:
    """How the documents of a row are told apart.

    With `eod_id` None by the spans of documents that the order put into the row. With an id by the
    tokens, each of which ends a document; this serves rows whose documents are unknown.
    """

    eod_id: int | None = None

    def segments(self, row: NDArray[np.int64], spans: Sequence[DocumentSpan]) -> NDArray[np.int64]:
        """The number, within the row, of each token's document: row (n,) -> (n,), from 0.

        Padding after all spans is a document of its own. A document that follows itself counts
        twice.
        """
        if self.eod_id is not None:
            # The end-of-document token belongs to the document that it ends.
            ends = np.cumsum(row == self.eod_id)
            return np.concatenate(([0], ends[:-1]))
        lengths = [span.length for span in spans]
        lengths.append(len(row) - sum(lengths))
        return np.repeat(np.arange(len(lengths)), lengths)


def positions_within(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token in its run of equal segments, (B, n) -> (B, n), from 0."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.ones(segments.shape, np.bool_)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def document_mask(config: DataConfig) -> DocumentMask | None:
    """The mask that data.document_mask asks for; None without it.

    Raises  ConfigError if it needs the end-of-document id and there is none.
    """
    if config.document_mask is None:
        return None
    if config.document_mask == "documents":
        return DocumentMask()
    return DocumentMask(end_of_document(config, "document_mask"))


def end_of_document(config: DataConfig, option: str) -> int:
    """The id of the token that ends a document, which `option` of the data section needs.

    The records of the token files say which token was appended to their documents; without one it
    is the tokenizer's.
    Raises  ConfigError if no tokenizer is configured, or it has no such token; DataError if the
            token files differ in it.
    """
    recorded = recorded_end(config.train_prefixes)
    if recorded is not None:
        return recorded
    if config.tokenizer is None:
        raise ConfigError(
            f"data.{option} needs data.tokenizer, to know the end-of-document id; set it to the"
            " tokenizer of the token files"
        )
    eod_id = load_tokenizer(config.tokenizer).eod_id
    if eod_id is None:
        raise ConfigError(
            f"data.{option} needs an end-of-document token, but tokenizer {config.tokenizer} has"
            " none"
        )
    return eod_id
