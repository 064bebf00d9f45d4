"""`ModelState`: what a model remembers of the tokens it has read, one `LayerState` for each block.

    state = model.new_state(batch=2, length=512)
    hidden = model(prompts, state=state)       # (2, T), padded on the right
    state.rewind(lengths)                      # (2,) tokens of each prompt, without the padding
    hidden = model(next_tokens, state=state)   # (2, 1), each row continues at its own length

Attention remembers keys and values by position (`KVCache`). Its state can be cut back to a prefix:
it `rewinds`. A recurrent state sums up all tokens and cannot be cut back. Code that needs a prefix
(padded prompts, reuse of a prompt, speculative decoding) asks `rewinds` first.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor


class LayerState:
    """What one block remembers. Each kind of block returns its own from `new_state`."""

    rewinds = False
    """Whether the state of a prefix is part of the state of the whole."""
    owner: "ModelState"
    """The state of all layers, which knows how many tokens each row has; set by `ModelState`."""

    has_rows = False
    """Whether rows can be copied, taken out and put back; a layer of another package may not."""

    def span_rows(self, begin: int, end: int) -> "LayerState":
        """Rows begin..end - 1, in the same memory; only where `rewinds`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cut back to a prefix")

    def copy_row(self, origin: int, target: int, tokens: int) -> None:
        """Give row `target` the first `tokens` tokens of row `origin`; only where `has_rows`.

        Where not `rewinds`, these are all tokens of the row.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rows to copy")

    def write_rows(self, rows: Sequence[int], other: "LayerState", tokens: int) -> None:
        """Replace `rows` by all rows of `other`, which has at most `tokens` tokens in each.

        Only where `has_rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rows to write")

    def take_rows(self, rows: Sequence[int], tokens: int, room: int) -> "LayerState":
        """Copies of `rows`, which have at most `tokens` tokens, with room for `room`; only where
        `has_rows`."""
        raise NotImplementedError(f"{type(self).__name__} has no rows to take")


class KVCache(LayerState):
    """Keys and values of one attention layer.

    Slot j of a row always holds the token at position j of that row. A query at position p may
    therefore see exactly the slots j <= p, and rows of different lengths need no other mask: the
    padding of a short prompt lies in slots that the row's next tokens overwrite before any query
    reaches them.

    Shapes  k, v (B, K, max_length, D), K key heads of width D.
    Units   2 * B * K * max_length * D numbers, in the dtype of the activations.
    """

    rewinds = True
    has_rows = True

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new keys and values (B, K, T, D); return the slots of all tokens so far."""
        owner = self.owner
        T = k.shape[2]
        end = owner.longest + T
        if owner.ragged:
            # Each row continues at its own length, so its slots are looked up one by one.
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            slots = owner.positions(T)
            self.k[rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)
            self.v[rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)
        else:
            # Equal rows write one slice, without index tensors: this runs for every token.
            self.k[:, :, owner.longest : end] = k
            self.v[:, :, owner.longest : end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def span_rows(self, begin: int, end: int) -> "KVCache":
        """See `LayerState`."""
        span = copy(self)
        span.k = self.k[begin:end]
        span.v = self.v[begin:end]
        return span

    def copy_row(self, origin: int, target: int, tokens: int) -> None:
        """See `LayerState`."""
        for kept in (self.k, self.v):
            kept[target, :, :tokens] = kept[origin, :, :tokens]

    def write_rows(self, rows: Sequence[int], other: LayerState, tokens: int) -> None:
        """See `LayerState`."""
        assert isinstance(other, KVCache)
        self.k[list(rows), :, :tokens] = other.k[:, :, :tokens]
        self.v[list(rows), :, :tokens] = other.v[:, :, :tokens]

    def take_rows(self, rows: Sequence[int], tokens: int, room: int) -> "KVCache":
        """See `LayerState`."""
        _, heads, _, width = self.k.shape
        taken = KVCache((len(rows), heads, room, width), self.k.dtype, self.k.device)
        taken.k[:, :, :tokens] = self.k[list(rows), :, :tokens]
        taken.v[:, :, :tokens] = self.v[list(rows), :, :tokens]
        return taken


class PositionCache(LayerState):
    """One vector of each token, by position, in the manner of `KVCache`.

    Shapes  kept (B, max_length, W).
    """

    rewinds = True
    has_rows = True

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.kept = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, new: Tensor) -> Tensor:
        """Write T new vectors (B, T, W); return those of all tokens so far (B, slots, W)."""
        owner = self.owner
        T = new.shape[1]
        end = owner.longest + T
        if owner.ragged:
            rows = torch.arange(len(new), device=new.device)[:, None]
            self.kept[rows, owner.positions(T)] = new.to(self.kept.dtype)
        else:
            self.kept[:, owner.longest : end] = new
        return self.kept[:, :end]

    def span_rows(self, begin: int, end: int) -> "PositionCache":
        """See `LayerState`."""
        span = copy(self)
        span.kept = self.kept[begin:end]
        return span

    def copy_row(self, origin: int, target: int, tokens: int) -> None:
        """See `LayerState`."""
        self.kept[target, :tokens] = self.kept[origin, :tokens]

    def write_rows(self, rows: Sequence[int], other: LayerState, tokens: int) -> None:
        """See `LayerState`."""
        assert isinstance(other, PositionCache)
        self.kept[list(rows), :tokens] = other.kept[:, :tokens]

    def take_rows(self, rows: Sequence[int], tokens: int, room: int) -> "PositionCache":
        """See `LayerState`."""
        shape = (len(rows), room, self.kept.shape[2])
        taken = PositionCache(shape, self.kept.dtype, self.kept.device)
        taken.kept[:, :tokens] = self.kept[list(rows), :tokens]
        return taken


class RecurrentState(LayerState):
    """What a recurrence remembers: tensors (B, ...) of a size that no token changes, by name.

    A row is copied and written whole: no part of it belongs to some of its tokens.
    """

    has_rows = True

    def __init__(self, **kept: Tensor) -> None:
        self.kept = kept

    def copy_row(self, origin: int, target: int, tokens: int) -> None:
        """See `LayerState`."""
        for kept in self.kept.values():
            kept[target] = kept[origin]

    def write_rows(self, rows: Sequence[int], other: LayerState, tokens: int) -> None:
        """See `LayerState`."""
        assert isinstance(other, RecurrentState)
        for name, kept in self.kept.items():
            kept[list(rows)] = other.kept[name].to(kept.dtype)

    def take_rows(self, rows: Sequence[int], tokens: int, room: int) -> "RecurrentState":
        """See `LayerState`."""
        return RecurrentState(**{name: kept[list(rows)] for name, kept in self.kept.items()})


class ModelState:
    """The states of all layers, for `batch` rows of at most `max_length` tokens.

    `Decoder.new_state` makes one. `lengths` (B,) int64 counts the tokens of each row, `longest` is
    the largest count and `ragged` says whether they differ. `rewinds` is True if every layer can be
    cut back: one recurrent layer among many is enough to lose the prefix.
    """

    def __init__(
        self,
        layers: Sequence[LayerState],
        batch: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        # One count of tokens for all layers: they are always at the same place of the sequence.
        self.layers = list(layers)
        for layer in self.layers:
            layer.owner = self
        self.max_length = max_length
        self.rewinds = all(layer.rewinds for layer in self.layers)
        self.has_rows = all(layer.has_rows for layer in self.layers)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # Plain numbers beside `lengths`: reading the tensor would wait for the GPU at every token.
        self.longest = 0
        self.ragged = False

    def __repr__(self) -> str:
        rows = f"{len(self.lengths)} rows of at most {self.max_length} tokens"
        return f"ModelState({len(self.layers)} layers, {rows}, {self.longest} in the longest)"

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: int64 (B, T), or (1, T) if all rows are equally long."""
        steps = torch.arange(T, device=self.lengths.device)
        if self.ragged:
            return self.lengths[:, None] + steps
        return steps[None] + self.longest

    def mask(self, T: int) -> Tensor | None:
        """Which slots the next T tokens may see, bool (1 or B, 1, T, longest + T), or None.

        None where the mask would say nothing new: one token after rows of equal length sees every
        slot, and in an empty state plain causal attention is right. Kernels are faster without one.
        """
        if self.longest == 0 or (T == 1 and not self.ragged):
            return None
        # Slot number and position are the same thing, so the mask is one comparison.
        slots = torch.arange(self.longest + T, device=self.lengths.device)
        return (slots <= self.positions(T)[..., None])[:, None]

    def require_room(self, T: int) -> None:
        """Raises  ValueError if T more tokens do not fit."""
        if self.longest + T > self.max_length:
            raise ValueError(
                f"the state holds at most {self.max_length} tokens a row; it has {self.longest} and"
                f" {T} more do not fit; make one with a larger length"
            )

    def advance(self, T: int) -> None:
        """Count T more tokens in each row. Decoder.forward calls this once all blocks have run."""
        self.lengths += T
        self.longest += T

    def rewind(self, lengths: Tensor) -> None:
        """Keep the first lengths[b] tokens of row b, (B,) int64, and forget the rest.

        Raises  ValueError if a length is negative or more than the row has, or the model has a
                layer whose state cannot be cut back.
        """
        if not self.rewinds:
            raise ValueError(
                "this model has a recurrent state, which cannot be cut back to a prefix; start a"
                " new state and read the prefix again"
            )
        # A longer row would read slots that hold zeros or another sequence.
        if bool(((lengths < 0) | (lengths.to(self.lengths.device) > self.lengths)).any()):
            raise ValueError(
                f"cannot rewind rows of {self.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        self.count(lengths.tolist())

    def count(self, lengths: Sequence[int]) -> None:
        """Set how many tokens each row has: what the layers hold has been changed to so many."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        self.longest = max(lengths)
        self.ragged = min(lengths) < self.longest

    def take_rows(self, rows: Sequence[int], lengths: Sequence[int], more: int) -> "ModelState":
        """Copies of `rows`, which have `lengths` tokens, with room for `more` in each; only where
        `has_rows`."""
        room = max(lengths) + more
        layers = [layer.take_rows(rows, max(lengths), room) for layer in self.layers]
        taken = ModelState(layers, len(rows), room, self.lengths.device)
        taken.count(lengths)
        return taken

    def span_rows(self, begin: int, end: int, lengths: Sequence[int]) -> "ModelState":
        """Rows begin..end - 1 cut back to `lengths`, a state that shares their memory; only where
        `rewinds`.

        What it appends overwrites what this state has behind the same lengths, and is not counted
        here.
        """
        layers = [layer.span_rows(begin, end) for layer in self.layers]
        span = ModelState(layers, end - begin, self.max_length, self.lengths.device)
        span.count(lengths)
        return span

    def copy_row(self, origin: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of row `origin` to row `target`; only where `has_rows`.

        The caller sets the length of `target` with `rewind` or `count` afterwards.
        """
        for layer in self.layers:
            layer.copy_row(origin, target, tokens)

    def write_rows(self, rows: Sequence[int], other: "ModelState") -> None:
        """Replace `rows` by the rows of `other`; only where `has_rows`.

        The caller sets their lengths with `rewind` or `count`.
        """
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.write_rows(rows, theirs, other.longest)
