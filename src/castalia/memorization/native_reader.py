"""A reader over the compiled step of the native engine: float32 on a CPU."""

import numpy as np

from castalia.memorization.reader import NEAR, Choices, Ids, Reader
from castalia.native.cache import FusedCache
from castalia.native.choosing import Chooser, Chosen, fits

TOKENS_AT_ONCE = 512
"""Tokens of a pass: their activations stay in the cache of the processor."""


class NativeReader(Reader):
    """Sequences in a cache of the compiled step, on one thread."""

    # Their keys and values should fit the processor's cache.
    rows_at_once = 32

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.cache: FusedCache | None = None

    def open(self, count: int, length: int) -> None:
        """See `Reader`. The memory is used again: what lies behind a sequence is never read."""
        if self.cache is None or not fits(self.cache, count, length):
            self.cache = self.chooser.forward.new_cache(count, length)

    def read(
        self, slots: Ids, starts: Ids, tokens: Ids, first: int, labels: Ids | None = None
    ) -> Choices:
        """See `Reader`."""
        assert self.cache is not None
        S, T = tokens.shape
        W = T - first
        rows = max(1, TOKENS_AT_ONCE // T)
        # The same for every part but the last, which takes the beginning of it.
        pick = (np.arange(rows)[:, None] * T + np.arange(first, T)).reshape(-1)
        parts: list[Chosen] = []
        for begin in range(0, S, rows):
            part = slice(begin, min(begin + rows, S))
            count = part.stop - begin
            parts.append(
                self.chooser.choose(
                    self.cache,
                    np.ascontiguousarray(tokens[part]).reshape(-1),
                    np.repeat(slots[part], T),
                    (starts[part, None] + np.arange(T)).reshape(-1),
                    pick[: count * W],
                    None if labels is None else np.ascontiguousarray(labels[part]).reshape(-1),
                )
            )
        losses = [part.losses for part in parts if part.losses is not None]
        return Choices(
            np.concatenate([part.best for part in parts]).reshape(S, W),
            (np.concatenate([part.gaps for part in parts]) < NEAR).reshape(S, W),
            np.concatenate(losses).reshape(S, W) if losses else None,
        )
