"""How a plan of prefixes.py is read: rows of a decoder's state, slots of an engine, or texts alone.

A reader answers with logits in parts, (positions, V) together, of the tokens wanted: those of each
row from place `firsts[row]` on. A part is valid until the next one is asked for, and all parts have
to be taken before the next call. The compiled step answers with what is made of the logits alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from castalia.inference.engine import Engine, ScoringModel, Slots
from castalia.inference.native_engine import NativeSlots
from castalia.inference.torch_slots import device_of, padded
from castalia.models import Decoder, ModelState

Rows = Sequence[Sequence[int]]

ROW_TOKENS = {"cpu": 128}
"""Tokens in a pass for each row of a batch: with 16 rows, products run at full speed, and the
activations stay in the last-level cache."""
ROW_TOKENS_DEVICE = 2048
"""The same on a GPU."""
PART_ROWS = {"cpu": 128}
"""Positions whose logits exist at a time: 26 MB at 50,304 tokens, which fit in a CPU's cache.
Larger buffers are returned to the system and mapped again for every part."""
PART_ROWS_DEVICE = 2048
"""The same on a GPU: 412 MB."""
MOST_SEVERAL = 0.2
"""Share of labels at positions that have one already, up to which logits are not stored: they save
about a third of the time where each position has one label."""


class Wanted(NamedTuple):
    """The predictions that lines take from some rows of one pass.

    `firsts` has a place for each row: tokens from there on are wanted. Of these positions, numbered
    through all rows, `positions` holds the one that each prediction is made at, in ascending order;
    `labels` the token predicted, `owners` the line; int64 each.
    """

    firsts: list[int]
    positions: Tensor
    labels: Tensor
    owners: Tensor


class Predicted(NamedTuple):
    """The next n predictions of those wanted, in place of the logits."""

    logprobs: Tensor
    """(n,) float32, of the labels."""
    likeliest: Tensor
    """(n,) int64, the first largest token."""


Parts = Iterator[Tensor] | Iterator[Predicted]


class Reader(ABC):
    """Reads headers, stems and branches; see prefixes.py."""

    copies: bool
    """Whether a state can be copied to other rows and cut back."""
    row_tokens = ROW_TOKENS["cpu"]
    """Tokens, padding included, in a pass for each row of a batch."""
    at_most_rows = False
    """Whether short lines may not share a pass in more rows than a batch has."""
    owns_logits = True
    """Whether logits may be overwritten."""
    one_length = False
    """Whether padding changes the logits, so that all rows of a pass must be equally long."""

    @abstractmethod
    def header(self, ids: Sequence[int], wanted: Wanted, rows: int, length: int) -> Parts:
        """Begin a section: `rows` rows of `length` tokens at most, which begin with `ids`."""

    @abstractmethod
    def stems(self, rows: Rows, wanted: Wanted, room: int) -> Parts:
        """Read stems after the header; `room` is the length of the longest branch."""

    @abstractmethod
    def branches(self, rows: Rows, wanted: Wanted) -> Parts:
        """Read branches after the first stems, and forget earlier branches."""


class DecoderReader(Reader):
    """Padded rows of a decoder of torch."""

    def __init__(self, model: ScoringModel) -> None:
        self.decoder = model.decoder
        self.head = model.head
        self.dtype = model.dtype
        self.device = device_of(self.decoder)
        self.one_length = follows_length(self.decoder)
        self.copies = self.decoder.family.can_rewind(self.decoder.config) and not self.one_length
        self.row_tokens = ROW_TOKENS.get(self.device.type, ROW_TOKENS_DEVICE)
        self.part_rows = PART_ROWS.get(self.device.type, PART_ROWS_DEVICE)
        self.whole: ModelState | None = None
        """The state of a section with a header."""
        self.state: ModelState | None = None
        """The state of the stems read last."""
        self.header_length = 0
        self.ends: list[int] = []

    @torch.inference_mode()
    def new_state(self, rows: int, length: int) -> ModelState:
        """An empty state."""
        return self.decoder.new_state(rows, length, self.dtype, self.device)

    def header(self, ids: Sequence[int], wanted: Wanted, rows: int, length: int) -> Parts:
        """See `Reader`."""
        # First, because the new one may need the memory.
        self.whole = None
        self.state = None
        self.header_length = len(ids)
        if not ids:
            return iter(())
        one = self.new_state(1, len(ids))
        parts = self.read([ids], wanted.firsts, one)
        self.whole = self.new_state(rows, length)
        with torch.inference_mode():
            self.whole.write_rows(range(rows), one)
        return parts

    def stems(self, rows: Rows, wanted: Wanted, room: int) -> Parts:
        """See `Reader`."""
        self.state = None
        self.ends = [self.header_length + len(ids) for ids in rows]
        if self.whole is not None:
            self.state = cut_back(self.whole, [self.header_length] * len(rows))
        elif room:
            self.state = self.new_state(len(rows), max(self.ends) + room)
        return self.read(rows, wanted.firsts, self.state)

    def branches(self, rows: Rows, wanted: Wanted) -> Parts:
        """See `Reader`."""
        assert self.state is not None
        return self.read(rows, wanted.firsts, cut_back(self.state, self.ends[: len(rows)]))

    @torch.inference_mode()
    def read(self, rows: Rows, firsts: Sequence[int], state: ModelState | None) -> Iterator[Tensor]:
        """One pass over rows that are padded on the right, where no token of theirs looks."""
        hidden = self.decoder(padded(rows).to(self.device), state=state)
        wanted = []
        for values, ids, first in zip(hidden, rows, firsts, strict=True):
            wanted.append(values[first : len(ids)])
        return self.logits(torch.cat(wanted))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states (n, C), in parts."""
        if not len(hidden):
            return
        for part in hidden.split(self.part_rows):
            with torch.inference_mode():
                logits = self.head(part)
            yield logits


def follows_length(decoder: Decoder) -> bool:
    """Whether the logits of a token depend on the length of its row, padding included."""
    scaling = getattr(decoder.config, "rope_scaling", None)
    return scaling is not None and scaling.kind == "dynamic"


@torch.inference_mode()
def cut_back(state: ModelState, lengths: Sequence[int]) -> ModelState:
    """The first rows of a state, cut back to `lengths`; the memory is shared."""
    return state.span_rows(0, len(lengths), lengths)


class SlotReader(Reader):
    """Slots of an engine that takes tokens of any slots in one step, without padding."""

    at_most_rows = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.slots: Slots | None = None
        self.header_length = 0
        self.ends: list[int] = []
        # Asked of slots: the engine does not know.
        self.copies = engine.scoring_slots(1, 1).rewinds  # type: ignore[union-attr]

    def header(self, ids: Sequence[int], wanted: Wanted, rows: int, length: int) -> Parts:
        """See `Reader`."""
        slots = self.slots = self.engine.scoring_slots(rows, length)
        assert slots is not None
        self.header_length = len(ids)
        if ids:
            yield from self.append(slots, [ids], wanted)
            for slot in range(1, rows):
                slots.copy(0, slot, len(ids))

    def stems(self, rows: Rows, wanted: Wanted, room: int) -> Parts:
        """See `Reader`."""
        self.ends = [self.header_length + len(ids) for ids in rows]
        return self.read(rows, wanted, [self.header_length] * len(rows))

    def branches(self, rows: Rows, wanted: Wanted) -> Parts:
        """See `Reader`."""
        return self.read(rows, wanted, self.ends[: len(rows)])

    def read(self, rows: Rows, wanted: Wanted, kept: Sequence[int]) -> Parts:
        """Cut the first slots back to `kept` tokens, and append rows."""
        assert self.slots is not None
        for slot, length in enumerate(kept):
            if length < self.slots.lengths[slot]:
                self.slots.copy(slot, slot, length)
        return self.append(self.slots, rows, wanted)

    def append(self, slots: Slots, rows: Rows, wanted: Wanted) -> Parts:
        """Append rows to the first slots."""
        labels = len(wanted.labels)
        # Several labels of one position, such as choices of one token, are looked up in its logits;
        # else each would be a row of the head's product.
        several = int((wanted.positions.diff() == 0).sum())
        if isinstance(slots, NativeSlots) and several <= MOST_SEVERAL * labels:
            return self.predicted(slots, rows, wanted)
        return slots.feed_from(range(len(rows)), rows, wanted.firsts)

    def predicted(self, slots: NativeSlots, rows: Rows, wanted: Wanted) -> Iterator[Predicted]:
        """Append rows, and compare with the labels without storing logits."""
        offered = []
        before = 0
        for ids, first in zip(rows, wanted.firsts, strict=True):
            offered.append(np.arange(before + first, before + len(ids)))
            before += len(ids)
        places = np.concatenate(offered)[wanted.positions.numpy()]
        for part in slots.predict(range(len(rows)), rows, places, wanted.labels.numpy()):
            losses, likeliest = map(torch.from_numpy, (part.losses, part.likeliest))
            yield Predicted(-losses, likeliest)


class TextReader(Reader):
    """Whole texts, for an engine that gives the logits of a text alone."""

    copies = False
    at_most_rows = True
    row_tokens = 1
    owns_logits = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def header(self, ids: Sequence[int], wanted: Wanted, rows: int, length: int) -> Parts:
        """See `Reader`; plans without copies have no headers."""
        return iter(())

    def stems(self, rows: Rows, wanted: Wanted, room: int) -> Parts:
        """See `Reader`."""
        for ids, first in zip(rows, wanted.firsts, strict=True):
            at = 0
            for part in self.engine.logits_in_parts(ids):
                skipped = min(max(0, first - at), len(part))
                at += len(part)
                yield part[skipped:]

    def branches(self, rows: Rows, wanted: Wanted) -> Parts:
        """See `Reader`; plans without copies have no branches."""
        raise AssertionError("a plan without copies has no branches")


def reader_of(engine: Engine) -> Reader:
    """The way in which an engine reads many lines."""
    model = engine.scoring_model()
    if model is not None:
        return DecoderReader(model)
    if engine.scoring_slots(1, 1) is not None:
        return SlotReader(engine)
    return TextReader(engine)
