"""CTranslate2 as an engine, over a folder of ours.

It keeps its cache to itself: only whole greedy texts come at its own speed, and what is drawn token by token from its
logits reads the text again for every token.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from castalia.data.tokenizer import Tokenizer
from castalia.inference.ct2 import Ct2Model
from castalia.inference.engine import Engine, Slots
from castalia.models.config import ModelConfig


class Ct2Slots(Slots):
    """The tokens of every slot; there is nothing else to keep."""

    def __init__(self, engine: "Ct2Engine", count: int, length: int) -> None:
        super().__init__(count, length)
        self.engine = engine
        self.tokens: list[list[int]] = [[] for _ in range(count)]

    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        for slot, ids in zip(slots, tokens, strict=True):
            self.tokens[slot] += ids
            self.lengths[slot] = len(self.tokens[slot])
        return torch.stack([self.engine.logits(self.tokens[slot])[-1] for slot in slots])

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        self.tokens[target] = self.tokens[origin][:tokens]
        self.lengths[target] = tokens


class Ct2Engine(Engine):
    """A CTranslate2 folder.

    Raises  ConfigError if ctranslate2 is not installed; CheckpointError if the folder is not whole.
    """

    name = "ct2"

    def __init__(self, folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        self.inner = Ct2Model(folder, tokenizer, threads=torch.get_num_threads())

    @property
    def numbers(self) -> str:
        """What the engine computes in on this machine."""
        return str(self.inner.generator.compute_type)

    def slots(self, count: int, length: int) -> Ct2Slots:
        """See `Engine`."""
        return Ct2Slots(self, count, length)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        out = self.inner.generator.forward_batch([[self.inner.vocabulary[i] for i in ids]])
        return torch.from_numpy(np.array(out))[0].float()

    def greedy(
        self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], end: int | None
    ) -> list[list[int]]:
        """See `Engine`."""
        made = self.inner.generate_ids(prompts, max(budgets))
        return [ids[:budget] for ids, budget in zip(made, budgets, strict=True)]
