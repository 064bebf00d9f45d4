"""An engine whose model has a soft prompt: every sequence begins behind its places."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from castalia.inference.engine import Engine, Slots
from castalia.inference.torch_engine import TorchEngine

NOTHING = 0
"""The id in the places of the prompt; the model does not look at it."""


class PromptedEngine(Engine):
    """The engine of a model with a soft prompt of `room` places, whose texts have so many tokens
    less."""

    name = TorchEngine.name
    batching = TorchEngine.batching
    scores = TorchEngine.scores

    def __init__(self, inner: TorchEngine, room: int) -> None:
        limit = inner.config.max_position_embeddings - room
        super().__init__(inner.config.model_copy(update={"max_position_embeddings": limit}))
        self.inner = inner
        self.before = [NOTHING] * room

    @property
    def device(self) -> torch.device:
        """See `Engine`."""
        return self.inner.device

    @property
    def numbers(self) -> str:
        """See `Engine`."""
        return self.inner.numbers

    def slots(self, count: int, length: int) -> Slots:
        """See `Engine`."""
        inner = self.inner.slots(count, length + len(self.before))
        return PromptedSlots(inner, length, self.before)

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`; without those of the prompt's places."""
        skipped = len(self.before)
        for part in self.inner.logits_in_parts([*self.before, *ids]):
            rest = part[skipped:]
            skipped = max(0, skipped - len(part))
            if len(rest):
                yield rest


class PromptedSlots(Slots):
    """Slots that read the places of the prompt before the first token of a sequence."""

    def __init__(self, inner: Slots, length: int, before: list[int]) -> None:
        super().__init__(inner.count, length)
        self.inner = inner
        self.before = before
        self.rewinds = inner.rewinds

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        rows = []
        for slot, ids in zip(slots, tokens, strict=True):
            rows.append(ids if self.lengths[slot] else [*self.before, *ids])
        logits = self.inner.feed(slots, rows)
        for slot, ids in zip(slots, tokens, strict=True):
            self.lengths[slot] += len(ids)
        return logits

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        self.inner.copy(origin, target, tokens + len(self.before) if tokens else 0)
        self.lengths[target] = tokens
