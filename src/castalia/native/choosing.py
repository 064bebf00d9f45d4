"""The largest logit after each token, or the loss of a label, without logits, by the compiled step.

The head of a small model costs more than all of its layers. To choose a token its logits need not
be known: the head in int8 gives each of them with a bound of its error, and only those that may be
the largest are computed in float32. The choice is that of the float32 head, by Cauchy-Schwarz:
with x' and w' as int8 holds them, x w = x' w' + x (w - w') + (x - x') w'. The mean of the head's
rows is taken off before, which moves all logits of a row alike and leaves smaller numbers to round.
"""

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from castalia.native.cache import FusedCache
from castalia.native.compiled import address, c_linear
from castalia.native.fused import FusedForward
from castalia.native.packing import CELLS, PANEL, Packed, dense, pack, quantized_rows
from castalia.native.structs import CBatch, CChoice
from castalia.native.weights import HEAD

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

LEAST_TOKENS = 4096
"""Smallest vocabulary whose logits are screened; fewer are computed as fast as their bounds."""


class Chosen(NamedTuple):
    """What the head says of W places."""

    best: Ids
    """(W,) the token of the largest logit, the first among equals; never padding."""
    gaps: Floats
    """(W,) how far below the second largest is; where that is farther than `near`, any number
    above it, also infinity."""
    losses: Floats | None
    """(W,) cross-entropy of the labels in nats, over the padded vocabulary; None without labels."""


class Screen(NamedTuple):
    """The head for bounds of logits."""

    packed: Packed
    """In int8, its rows less their mean."""
    rows: Tensor
    """(tokens, C) float32, as it is."""
    error: float
    """The largest |w - w'| of a token, over the scale of its row."""
    norm: float
    """The largest |w'| of a token, over its scale."""


def screen_of(head: Packed, tokens: int) -> Screen | None:
    """The screen of a head of float32; None where it would save nothing."""
    # Other storages are rounded already, and int8 products take whole cells of inputs.
    if head.storage != "fp32" or tokens < LEAST_TOKENS or head.inputs % CELLS["int8"]:
        return None
    rows = dense(head)[:tokens].contiguous()
    centred = rows - rows.double().mean(0).float()
    packed = pack(centred, None, "int8")
    numbers, scale = quantized_rows(packed)
    assert packed.scale is not None
    # A row of zeros has a scale that divides nothing.
    steps = scale[:tokens].double().clamp_min(1e-30)[:, None]
    rounded = numbers[:tokens].double()
    error = float((centred.double() / steps - rounded).norm(dim=1).max())
    return Screen(packed, rows, error, float(rounded.norm(dim=1).max()))


class Chooser:
    """Choices of one model; several threads may ask at once, each with a cache of its own."""

    def __init__(self, forward: FusedForward, near: float) -> None:
        """`near`: logits that close to the largest are told apart from it."""
        self.forward = forward
        self.near = near
        config = forward.weights.config
        self.tokens = config.vocab_size
        head = forward.weights.products[HEAD]
        self.screen = None
        if forward.native.castalia_has_dot():
            self.screen = screen_of(head, config.vocab_size)
        self.screened = None if self.screen is None else c_linear(self.screen.packed)

    def choose(
        self,
        cache: FusedCache,
        tokens: Ids,
        slots: Ids,
        positions: Ids,
        pick: Ids,
        labels: Ids | None = None,
        threads: int = 1,
    ) -> Chosen:
        """Read M tokens, each at its position of its slot; choose after those picked, ascending.

        Shapes  tokens, slots, positions (M,); pick, labels (W,), contiguous int64.
        """
        best = np.empty(len(pick), np.int64)
        gaps = np.empty(len(pick), np.float32)
        losses = None if labels is None else np.empty(len(pick), np.float32)
        batch = CBatch(
            len(tokens),
            *(array.ctypes.data for array in (tokens, slots, positions)),
            len(pick),
            pick.ctypes.data,
            None,
        )
        choice = self.c_choice(best, gaps, labels, losses)
        failed = self.forward.native.castalia_choose(
            ctypes.addressof(self.forward.model),
            ctypes.addressof(cache.c),
            ctypes.addressof(batch),
            ctypes.addressof(choice),
            threads,
        )
        if failed:
            raise MemoryError(f"no memory for a pass over {len(tokens)} tokens")
        return Chosen(best, gaps, losses)

    def c_choice(
        self, best: Ids, gaps: Floats, labels: Ids | None, losses: Floats | None
    ) -> CChoice:
        """The structure that the library reads and fills."""
        choice = CChoice(near=self.near, tokens=self.tokens)
        choice.best = best.ctypes.data
        choice.gap = gaps.ctypes.data
        # What is left out is null: no screen, no labels.
        if self.screen is not None and self.screened is not None:
            choice.screen = ctypes.addressof(self.screened)
            choice.head = address(self.screen.rows)
            choice.weight_error = self.screen.error
            choice.weight_norm = self.screen.norm
        if labels is not None and losses is not None:
            choice.label = labels.ctypes.data
            choice.loss = losses.ctypes.data
        return choice


class Predictions(NamedTuple):
    """What the head says of W places, beside their labels."""

    likeliest: Ids
    """(W,) the token of the largest logit over the padded vocabulary, the first among equals."""
    losses: Floats
    """(W,) cross-entropy of the labels in nats, over the padded vocabulary."""


def predictions(
    forward: FusedForward,
    cache: FusedCache,
    placed: tuple[Ids, Ids, Ids],
    pick: Ids,
    labels: Ids,
    threads: int,
) -> Predictions:
    """Read M tokens, and compare what follows those picked, ascending, with their labels.

    Takes   placed: tokens, slots and positions, (M,) each.
    Shapes  pick, labels (W,), contiguous int64. The logits stay in the processor's cache, some
            columns at a time.
    """
    likeliest = np.empty(len(pick), np.int64)
    gaps = np.empty(len(pick), np.float32)
    losses = np.empty(len(pick), np.float32)
    places = (array.ctypes.data for array in placed)
    batch = CBatch(len(placed[0]), *places, len(pick), pick.ctypes.data, None)
    choice = CChoice(near=0.0, tokens=forward.weights.config.padded_vocab_size)
    choice.best = likeliest.ctypes.data
    choice.gap = gaps.ctypes.data
    choice.label = labels.ctypes.data
    choice.loss = losses.ctypes.data
    choice.rounds = forward.rounds_scores
    failed = forward.native.castalia_choose(
        ctypes.addressof(forward.model),
        ctypes.addressof(cache.c),
        ctypes.addressof(batch),
        ctypes.addressof(choice),
        threads,
    )
    if failed:
        raise MemoryError(f"no memory for a pass over {len(placed[0])} tokens")
    return Predictions(likeliest, losses)


def label_losses(
    forward: FusedForward, cache: FusedCache, tokens: Ids, labels: Ids, start: int, threads: int
) -> Floats:
    """Append M tokens to the first slot, which holds `start`; cross-entropies of what follows each.

    Shapes  tokens, labels (M,) contiguous int64 -> (M,) float32; see `predictions`.
    """
    count = len(tokens)
    placed = (tokens, np.zeros(count, np.int64), np.arange(start, start + count))
    return predictions(forward, cache, placed, np.arange(count), labels, threads).losses


def fits(cache: FusedCache, count: int, length: int) -> bool:
    """Whether a cache has room for so many sequences of so many tokens."""
    return cache.c.slots >= count and cache.c.length >= -(-length // PANEL) * PANEL
