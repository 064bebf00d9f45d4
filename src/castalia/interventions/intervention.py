"""`Intervention`: one section of data.interventions as a change of rows; the base of all kinds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import DataError
from castalia.data.indexed import IndexedDataset
from castalia.data.intervention_config import InterventionConfig
from castalia.data.row_changes import ServedRow
from castalia.data.row_source import DocumentSpan
from castalia.interventions.rewriting import TokenEdit
from castalia.tokenizers.tokenizer import Tokenizer

LENGTH = "another number of tokens"
"""Why the policy skip leaves a change out."""


class Where(NamedTuple):
    """Which row of the run is changed."""

    step: int
    row: int
    """Its number within the step."""
    rows: int
    """Rows of the step."""
    source: int


@dataclass
class Notes:
    """What an intervention did to one row, for reports."""

    before: ServedRow
    """The row as it was given it."""
    edits: list[tuple[DocumentSpan, TokenEdit]] = field(default_factory=list)
    """Each change with its document; its places are those of `before`."""
    left_out: list[str] = field(default_factory=list)
    """Why further changes were not made."""


@dataclass(frozen=True)
class Facts:
    """What interventions know about their run."""

    tokenizer: Tokenizer | None
    names: Sequence[str]
    """Names of the training sources."""
    datasets: Sequence[IndexedDataset]
    """Their token files."""
    vocab_size: int
    """Ids that the model has."""
    seq_length: int
    eod_id: int | None
    """The id that ends a document."""
    ready: bool = False
    """Whether the items of the files are rows of several documents each."""


class Intervention(ABC):
    """A change of the rows of steps [first, stop).

    `where` names the section in errors; `sources` are the numbers of those that it applies to.
    """

    def __init__(
        self, config: InterventionConfig, where: str, steps: tuple[int, int], sources: set[int]
    ) -> None:
        self.config = config
        self.where = where
        self.first = steps[0]
        self.stop = steps[1]
        self.sources = sources

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where}, steps {self.first} to {self.stop - 1})"

    def applies(self, where: Where) -> bool:
        """Whether it may change the row."""
        return self.first <= where.step < self.stop and where.source in self.sources

    @abstractmethod
    def __call__(self, row: ServedRow, where: Where, facts: Facts, notes: Notes) -> ServedRow:
        """The changed row; the very same object where nothing changes.

        Raises  DataError if a change has another length, and none may.
        """


class PieceIntervention(Intervention):
    """One that changes each document of a row by itself, as far as the row holds it."""

    @abstractmethod
    def edits(self, tokens: NDArray[np.int64], notes: Notes) -> list[TokenEdit]:
        """What changes in the tokens (n,) of one document, ascending."""

    def __call__(self, row: ServedRow, where: Where, facts: Facts, notes: Notes) -> ServedRow:
        """The row with the edits of its documents."""
        kept = []
        begin = 0
        for span in row.spans:
            for edit in self.edits(row.tokens[begin : begin + span.length], notes):
                if self.fits(edit, span, where, facts, notes):
                    moved = edit._replace(start=begin + edit.start, stop=begin + edit.stop)
                    kept.append(moved)
                    notes.edits.append((span, moved))
            begin += span.length
        return edited(row, kept) if kept else row

    def fits(
        self, edit: TokenEdit, span: DocumentSpan, where: Where, facts: Facts, notes: Notes
    ) -> bool:
        """Whether the length policy lets a change happen.

        Raises  DataError under the policy refuse.
        """
        if not edit.growth or self.config.length == "fit":
            return True
        if self.config.length == "skip":
            notes.left_out.append(LENGTH)
            return False
        counts = f"{len(edit.ids)} tokens in place of {edit.stop - edit.start}"
        raise DataError(
            f"{self.where}: at step {where.step}, row {where.row}, document {span.document} of"
            f" {facts.names[where.source]}, {edit.old_text!r} becomes {edit.new_text!r}, {counts},"
            " and length: refuse keeps every length; length: skip leaves such changes out, fit cuts"
            " or fills the row"
        )


def edited(row: ServedRow, edits: Sequence[TokenEdit]) -> ServedRow:
    """A row with edits, which ascend and do not overlap.

    A longer text is cut at the end of the row; behind a shorter one the row is filled with 0, which
    is no target.
    """
    filled = sum(span.length for span in row.spans)
    tokens = []
    places = []
    at = 0
    for edit in edits:
        tokens += [row.tokens[at : edit.start], edit.ids]
        places += [np.arange(at, edit.start), spread(edit, filled)]
        at = edit.stop
    tokens.append(row.tokens[at:filled])
    places.append(np.arange(at, filled))
    size = len(row.tokens)
    # The row keeps its length: all others of its step, and every shape, depend on it.
    new = np.concatenate(tokens)[:size]
    whence = np.concatenate(places)[:size]
    padding = size - len(new)
    document_of = np.repeat(np.arange(len(row.spans)), [span.length for span in row.spans])
    lengths = np.bincount(document_of[whence], minlength=len(row.spans)).tolist()
    spans = [span._replace(length=n) for span, n in zip(row.spans, lengths, strict=True) if n]
    whence = np.append(whence, np.full(padding, size - 1))
    ignored = None
    if padding or row.ignored is not None:
        old = np.zeros(size, np.bool_) if row.ignored is None else row.ignored
        ignored = old[whence]
        ignored[len(new) :] = True
    # The row may be changed already: what its own tokens stand for is what the new ones do.
    origin = row.moved(np.arange(size))[whence]
    return ServedRow(np.append(new, np.zeros(padding, np.int64)), spans, ignored, origin)


def spread(edit: TokenEdit, filled: int) -> NDArray[np.int64]:
    """The old place that each new token of an edit stands for, in a row of `filled` tokens."""
    width = edit.stop - edit.start
    places = edit.start + np.arange(len(edit.ids)) * width // max(1, len(edit.ids))
    return np.minimum(places, filled - 1)
