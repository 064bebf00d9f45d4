"""Sequences as the rows of a decoder's state: padded, unpadded, or one state for each.

Which of them a model has depends on what its state can do; see castalia.models.state.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from castalia.inference.engine import HEAD_ROWS, Slots
from castalia.inference.passes import NewRow, grouped, pass_tokens
from castalia.models import Decoder, ModelState


class TorchSlots(Slots):
    """Slots that are the rows of one state, for models whose state can be rewound.

    A step of one token takes all rows from the first to the last one of the step, because a batch
    costs less than gathering the rows in use: those without a token read a zero that is not
    counted. More tokens of any number, behind prefixes of any lengths, are read in passes over the
    rows concerned alone; see passes.py.
    """

    scores_prompts = True

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.device = device_of(model)
        # One position more than asked for: a full row that idles has to put its zero somewhere.
        self.state = model.new_state(count, length + 1, dtype, self.device)

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        if max(len(ids) for ids in tokens) == 1:
            return self.model.head(self.step(slots, tokens)).float()
        ends: dict[int, Tensor] = {}
        # Of the parts of a long row the last one counts; only its last token is asked for.
        for place, hidden in self.read(slots, tokens):
            ends[place] = hidden[-1]
        return self.model.head(torch.stack([ends[i] for i in range(len(slots))])).float()

    def feed_from(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> Iterator[Tensor]:
        """See `Slots`."""
        with torch.inference_mode():
            hidden: list[list[Tensor]] = [[] for _ in slots]
            # Hidden states are small beside logits: all of them wait for the head.
            for place, part in self.read(slots, tokens):
                hidden[place].append(part)
            wanted = []
            for parts, first in zip(hidden, firsts, strict=True):
                wanted.append(torch.cat(parts)[first:])
            rows = torch.cat(wanted).split(HEAD_ROWS)
        for part in rows:
            # Not around the yield: the caller's code is no inference.
            with torch.inference_mode():
                logits = self.model.head(part).float()
            yield logits

    def step(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (len(slots), C) after one more token of each of some slots."""
        first = min(slots)
        end = max(slots) + 1
        ids = [[0] for _ in range(first, end)]
        for slot, own in zip(slots, tokens, strict=True):
            ids[slot - first] = list(own)
        batch = torch.tensor(ids, device=self.device)
        # All rows have a token: the state counts them itself, and is right as it is.
        whole = len(slots) == self.count
        state = self.state
        if not whole:
            state = self.state.span_rows(first, end, self.lengths[first:end])
        hidden: Tensor = self.model(batch, state=state)[:, 0]
        self.add(slots, tokens, counted=whole)
        if len(slots) == end - first and list(slots) == list(range(first, end)):
            return hidden
        return hidden[torch.tensor([slot - first for slot in slots], device=self.device)]

    def read(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Append tokens to some slots; places in `slots` and hidden states (n, C) after n of them.

        A long row comes in parts.
        """
        rows = []
        for slot, ids in zip(slots, tokens, strict=True):
            rows.append(NewRow(self.lengths[slot], len(ids)))
        for places in grouped(rows, self.model.config.hidden_size, self.device.type):
            if len(places) == 1:
                (place,) = places
                for hidden in self.read_alone(slots[place], tokens[place]):
                    yield place, hidden
                continue
            parts = [tokens[i] for i in places]
            found = self.read_together([slots[i] for i in places], parts)
            for place, row, ids in zip(places, found, parts, strict=True):
                yield place, row[: len(ids)]

    def read_alone(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Hidden states (n, C) after tokens of one slot, in parts: the row is read where it is."""
        most = pass_tokens(self.device.type)
        for start in range(0, len(tokens), most):
            part = tokens[start : start + most]
            row = self.state.span_rows(slot, slot + 1, [self.lengths[slot]])
            hidden = self.model(torch.tensor([list(part)], device=self.device), state=row)[0]
            self.add([slot], [part])
            yield hidden

    def read_together(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (len(slots), T, C) after T tokens of each of some slots, in one pass; those
        of shorter rows end with padding."""
        batch = padded(tokens).to(self.device)
        T = batch.shape[1]
        starts = [self.lengths[slot] for slot in slots]
        span = list(range(slots[0], slots[0] + len(slots)))
        # Rows side by side are read where they are, if their padding fits behind the longest.
        in_place = list(slots) == span and max(starts) + T <= self.state.max_length
        if in_place:
            rows = self.state.span_rows(span[0], span[-1] + 1, starts)
        else:
            rows = self.state.take_rows(slots, starts, T)
        hidden: Tensor = self.model(batch, state=rows)
        if not in_place:
            # Without the padding, for which the slots have no room.
            ends = zip(starts, tokens, strict=True)
            rows.count([start + len(ids) for start, ids in ends])
            self.state.write_rows(slots, rows)
        self.add(slots, tokens)
        return hidden

    def add(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], *, counted: bool = False
    ) -> None:
        """Count tokens that were read; `counted` if the state has counted them."""
        for slot, ids in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(ids)
        if not counted:
            self.state.count(self.lengths)

    @torch.inference_mode()
    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; the slot's row alone."""
        return self.model.head(torch.cat(list(self.read_alone(slot, tokens)))).float()

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin != target:
            self.state.copy_row(origin, target, tokens)
        self.lengths[target] = tokens
        self.state.count(self.lengths)


class UnpaddedSlots(Slots):
    """Slots that are the rows of one state which cannot be rewound.

    Such a state can neither forget padding nor the zero of an idle row: a pass has as many tokens
    of each of its rows, and rows that have none left are not in it.
    """

    rewinds = False
    scores_prompts = True

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.device = device_of(model)
        self.state = model.new_state(count, length, dtype, self.device)
        self.empty = model.new_state(1, 1, dtype, self.device)

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        ends: dict[int, Tensor] = {}
        start = 0
        # What all rows have is read together, then what all but the shortest have, and so on.
        for end in sorted({len(ids) for ids in tokens}):
            places = [i for i, ids in enumerate(tokens) if len(ids) > start]
            parts = [tokens[i][start:end] for i in places]
            for hidden in self.read([slots[i] for i in places], parts):
                last = hidden[:, -1]
            ends |= {i: last[row] for row, i in enumerate(places) if len(tokens[i]) == end}
            start = end
        return self.model.head(torch.stack([ends[i] for i in range(len(tokens))])).float()

    @torch.inference_mode()
    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        return self.model.head(torch.cat(list(self.read([slot], [tokens])), 1)[0]).float()

    def read(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Hidden states (B, n, C) of T more tokens of each of some slots, in parts."""
        batch = torch.tensor([list(ids) for ids in tokens], device=self.device)
        T = batch.shape[1]
        whole = list(slots) == list(range(self.count))
        rows = self.state
        if not whole:
            rows = self.state.take_rows(slots, [self.lengths[slot] for slot in slots], T)
        for part in batch.split(max(1, pass_tokens(self.device.type) // len(slots)), 1):
            yield self.model(part, state=rows)
        if not whole:
            self.state.write_rows(slots, rows)
        for slot in slots:
            self.lengths[slot] += T
        if not whole:
            self.state.count(self.lengths)

    @torch.inference_mode()
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`.

        Raises  ValueError for a part of a sequence.
        """
        if tokens == 0:
            self.state.write_rows([target], self.empty)
        else:
            require_whole(tokens, self.lengths[origin])
            self.state.copy_row(origin, target, tokens)
        self.lengths[target] = tokens
        self.state.count(self.lengths)


def require_whole(tokens: int, length: int) -> None:
    """Raises  ValueError for a part of a sequence, whose state does not exist."""
    if tokens != length:
        raise ValueError(
            f"cannot cut {length} tokens to {tokens}: the state of the model cannot be rewound"
        )


class SeparateSlots(Slots):
    """One state for each slot, for models whose state can neither be rewound nor has rows."""

    rewinds = False
    scores_prompts = True

    def __init__(self, model: Decoder, count: int, length: int, dtype: torch.dtype) -> None:
        super().__init__(count, length)
        self.model = model
        self.length = length
        self.dtype = dtype
        self.device = device_of(model)
        self.states = [self.new_state() for _ in range(count)]

    def new_state(self) -> ModelState:
        """An empty state of one row."""
        return self.model.new_state(1, self.length, self.dtype, self.device)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        parts = [self.hidden(slot, ids)[-1:] for slot, ids in zip(slots, tokens, strict=True)]
        return self.head(torch.cat(parts))

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        return self.head(self.hidden(slot, tokens))

    @torch.inference_mode()
    def hidden(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Hidden states (T, C) of T more tokens of a slot."""
        hidden: Tensor = self.model(padded([tokens]).to(self.device), state=self.states[slot])[0]
        self.lengths[slot] += len(tokens)
        return hidden

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return self.model.head(hidden).float()

    @torch.inference_mode()
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`.

        Raises  ValueError for a part of a sequence.
        """
        if tokens == 0:
            self.states[target] = self.new_state()
        else:
            require_whole(tokens, self.lengths[origin])
            if origin != target:
                # A state of any family: only its own copy is sure to hold all of it.
                self.states[target] = deepcopy(self.states[origin])
        self.lengths[target] = tokens


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids as (B, T) int64, with zeros on the right."""
    batch = torch.zeros(len(rows), max(len(ids) for ids in rows), dtype=torch.int64)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return batch


def model_slots(model: Decoder, count: int, length: int, dtype: torch.dtype) -> Slots:
    """Slots for a model whose activations have `dtype`, of the kind that its state allows."""
    # Asked of a state, not of the family: one layer of another kind decides for the whole model.
    state = model.new_state(1, 1, dtype, device_of(model))
    if state.rewinds and state.has_rows:
        return TorchSlots(model, count, length, dtype)
    kind = UnpaddedSlots if state.has_rows else SeparateSlots
    return kind(model, count, length, dtype)


def device_of(model: Decoder) -> torch.device:
    """Device of a model whose weights are on one."""
    parameter = next(model.parameters(), None)
    # Packed layers have no parameters, nor have norms of some kinds; they lie on the CPU.
    return torch.device("cpu") if parameter is None else parameter.device
