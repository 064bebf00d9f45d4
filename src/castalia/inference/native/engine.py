"""The native engine: quantized weights, a static KV cache of slots, compiled steps where a compiler is there."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from castalia.inference.engine import HEAD_ROWS, Engine, Slots
from castalia.inference.native.compiled import library
from castalia.inference.native.forward import TorchForward
from castalia.inference.native.fused import FusedForward
from castalia.inference.native.kernels import is_fused
from castalia.inference.native.scoring import Scorer
from castalia.inference.native.tuning import chosen
from castalia.inference.native.weights import Weights

ROWS_AT_ONCE = 256
"""Tokens of prompts in one pass: enough for full speed, and little memory."""


class NativeSlots(Slots):
    """Sequences in the engine's static cache; the rows of one pass may belong to any of them."""

    def __init__(self, forward: Any, count: int, length: int) -> None:
        super().__init__(count, length)
        self.forward = forward
        self.cache = forward.new_cache(count, length)

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`. The logits are overwritten by the next call."""
        rows = [
            (token, slot, self.lengths[slot] + i)
            for slot, ids in zip(slots, tokens, strict=True)
            for i, token in enumerate(ids)
        ]
        ends, last = [], -1
        for ids in tokens:
            last += len(ids)
            ends.append(last)
        for slot, ids in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(ids)
        if len(rows) <= ROWS_AT_ONCE:
            return self.run(rows, ends)
        parts = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            parts.append(
                self.run(
                    part, [end - start for end in ends if start <= end < start + len(part)]
                ).clone()
            )
        return torch.cat(parts)

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass."""
        start = self.lengths[slot]
        self.lengths[slot] += len(tokens)
        return self.run(
            [(token, slot, start + i) for i, token in enumerate(tokens)], list(range(len(tokens)))
        )

    def run(self, rows: list[tuple[int, int, int]], pick: list[int]) -> Tensor:
        """One pass."""
        tokens, slots, positions = zip(*rows, strict=True)
        logits: Tensor = self.forward.run(self.cache, tokens, slots, positions, pick)
        return logits

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin != target:
            self.cache.copy(origin, target, tokens)
        self.lengths[target] = tokens


class NativeEngine(Engine):
    """Weights of one storage; see the package's docstring for what each does.

    `kernels` is auto (compiled steps, else the fastest kernels of torch), torch, or the name of one kernel. `scoring`
    is the dtype in which texts are scored: the storage's own numbers, or bf16.
    """

    name = "native"

    def __init__(self, weights: Weights, kernels: str = "auto", scoring: str | None = None) -> None:
        super().__init__(weights.config)
        self.weights = weights
        self.forward: Any
        native = library() if kernels == "auto" else None
        self.forward = FusedForward(weights, native) if is_fused(native, weights.storage) else None
        if self.forward is None:
            choice = chosen(list(weights.linears.values()), weights.storage, kernels)
            whole = native is not None and set(choice.values()) == {"compiled"}
            self.forward = FusedForward(weights, native) if whole else TorchForward(weights, choice)
        self.scoring = scoring or weights.storage
        self.made: Scorer | None = None

    @property
    def numbers(self) -> str:
        """The storage."""
        return self.weights.storage

    def slots(self, count: int, length: int) -> NativeSlots:
        """See `Engine`."""
        return NativeSlots(self.forward, count, length)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`; in the storage's own arithmetic, as it decodes."""
        return torch.cat([part.clone() for part in self.read(ids)])

    def read(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Logits after each token, HEAD_ROWS at a time; each part lives until the next."""
        cache = self.forward.new_cache(1, len(ids))
        for start in range(0, len(ids), HEAD_ROWS):
            part = ids[start : start + HEAD_ROWS]
            places = range(start, start + len(part))
            yield self.forward.run(cache, part, [0] * len(part), places, range(len(part)))

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        if self.scoring == "bf16":
            if self.made is None:
                self.made = Scorer(self.weights)
            return self.made.logprobs(ids)
        labels = torch.tensor(list(ids[1:]), dtype=torch.int64).split(HEAD_ROWS)
        parts = [
            logits[: len(wanted)].log_softmax(1).gather(1, wanted[:, None])[:, 0]
            for logits, wanted in zip(self.read(ids), labels, strict=False)
        ]
        return torch.cat(parts) if parts else torch.empty(0)
