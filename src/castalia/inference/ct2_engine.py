"""CTranslate2 as an engine, over a folder of ours.

It keeps its cache to itself: only whole greedy texts come at its own speed, and what is drawn token by token from its
logits reads the text again for every token.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from castalia.core.errors import CheckpointError
from castalia.core.extras import require
from castalia.data.tokenizer import Tokenizer
from castalia.inference.engine import Engine, Slots
from castalia.models.config import ModelConfig


class Ct2Model:
    """A CTranslate2 folder on the CPU, with the tokenizer that the weights were trained with."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, threads: int = 0) -> None:
        """`threads` of 0 takes the engine's default.

        Raises  ConfigError if CTranslate2 is not installed; CheckpointError if the folder is no model of its.
        """
        engine = require("ctranslate2", "ct2", "running a CTranslate2 model")
        self.folder, self.tokenizer = Path(folder), tokenizer
        try:
            self.generator = engine.Generator(str(folder), device="cpu", intra_threads=threads)
            self.vocabulary: list[str] = json.loads(
                (self.folder / "vocabulary.json").read_text(encoding="utf-8")
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {folder} in CTranslate2: {error}") from None
        self.padding = [[token] for token in self.vocabulary[tokenizer.vocab_size :]]

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64
    ) -> list[list[int]]:
        """Greedy continuations of prompts that are not empty; the end-of-document token ends one and is left out."""
        end = None if self.tokenizer.eod_id is None else [self.tokenizer.eod_id]
        results = self.generator.generate_batch(
            [[self.vocabulary[i] for i in ids] for ids in prompts],
            # Rows of unequal length would be forced through the engine token by token.
            max_batch_size=1,
            max_length=max_new_tokens,
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=end,
            suppress_sequences=self.padding or None,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy continuations, without the prompts; an empty prompt starts from the end-of-document token."""
        start = [] if self.tokenizer.eod_id is None else [self.tokenizer.eod_id]
        ids = [self.tokenizer.encode(prompt) or start for prompt in prompts]
        return [self.tokenizer.decode(made) for made in self.generate_ids(ids, max_new_tokens)]

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first, in nats: T ids -> T - 1 numbers."""
        tokens = [[self.vocabulary[i] for i in ids]]
        # The engine's default cuts a text at 1024 tokens in silence; 0 does not.
        (result,) = self.generator.score_batch(tokens, max_input_length=0)
        return [float(value) for value in result.log_probs]


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
