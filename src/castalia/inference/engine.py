"""What every engine offers: sequences in slots that grow token by token, and log-probabilities of whole texts.

Sampling, stop strings, streams and batches are built on `Slots.feed` once, in batching.py, so that the same seed draws
the same tokens from the same logits whatever the engine is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from castalia.models.config import ModelConfig

HEAD_ROWS = 256
"""Positions whose logits exist at a time when a text is scored: 256 x 50,304 x 4 bytes is 51 MB."""


class Slots(ABC):
    """`count` sequences of at most `length` tokens, each at its own length; sequences come and go between calls."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length
        self.lengths = [0] * count

    @abstractmethod
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens[i], at least one, to the sequence in slots[i]; slots that are not named stay as they are.

        Returns  logits (len(slots), V) float32 after the last token of each, V being at least the vocabulary. They may
                 be overwritten by the next call.
        """

    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """As `feed` for one slot, with the logits after every token: (len(tokens), V) float32."""
        return torch.cat([self.feed([slot], [[token]]).clone() for token in tokens])

    @abstractmethod
    def copy(self, origin: int, target: int, tokens: int) -> None:
        """Let `target` hold the first `tokens` of `origin`, and forget the rest; both may be the same slot."""

    def clear(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self.copy(slot, slot, 0)


class Engine(ABC):
    """A model that some library computes."""

    name: ClassVar[str]

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        return torch.device("cpu")

    @property
    @abstractmethod
    def numbers(self) -> str:
        """The dtype or quantization of the weights."""

    @abstractmethod
    def slots(self, count: int, length: int) -> Slots:
        """Room for `count` sequences of at most `length` tokens."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token: T ids -> (T, V) float32, V being at least the vocabulary."""

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token but the first, given those before it: T ids -> (T - 1,) float32, in nats."""
        logits = self.logits(ids)[:-1]
        labels = torch.tensor(ids[1:], device=logits.device)[:, None]
        parts = [
            rows.log_softmax(1).gather(1, picked)[:, 0]
            for rows, picked in zip(logits.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True)
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    def greedy(
        self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], end: int | None
    ) -> list[list[int]] | None:
        """Whole greedy continuations by a way of the engine's own that is faster than slots, or None if it has none.

        The token `end` ends a row and is left out; row i has at most budgets[i] tokens.
        """
        return None


@dataclass(frozen=True)
class Capabilities:
    """What one engine can do."""

    reads: str
    """Where weights come from."""
    numbers: tuple[str, ...]
    """dtype= or --quantization."""
    devices: tuple[str, ...]
    batching: str
    """How sequences of unequal length share a step."""
    streams: bool
    scores: str
    extra: str | None
    """The pip extra that it needs."""


CAPABILITIES = {
    "native": Capabilities(
        "a checkpoint, a Hugging Face folder, `export --to native`",
        ("auto", "fp32", "bf16", "fp16", "int8", "int4"),
        ("cpu",),
        "continuous",
        True,
        "bf16 with dtype=auto, else as it decodes",
        None,
    ),
    "torch": Capabilities(
        "a checkpoint, a Hugging Face folder",
        ("fp32", "bf16", "fp16"),
        ("cpu", "cuda"),
        "continuous",
        True,
        "in its dtype",
        None,
    ),
    "ct2": Capabilities(
        "`export --to ct2`",
        ("as exported",),
        ("cpu",),
        "whole texts, greedy only; else every step reads the text again",
        True,
        "in its own arithmetic",
        "ct2",
    ),
    "llama.cpp": Capabilities(
        "`export --to gguf`",
        ("as exported",),
        ("cpu",),
        "continuous",
        True,
        "as it decodes",
        "llama",
    ),
    "openvino": Capabilities(
        "a checkpoint, a Hugging Face folder",
        ("fp32", "int8"),
        ("cpu",),
        "one after the other",
        True,
        "as it decodes",
        "openvino",
    ),
}
"""Engines by the names that `engine=` takes besides auto."""
