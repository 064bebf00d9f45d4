"""CTranslate2 as an engine, over an export folder.

The library gives no access to its cache. Whole greedy texts therefore run at its own speed, while
drawing token by token from its logits reads the text again for every token.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.extras import require
from castalia.formats.saved_model import TOKENIZER
from castalia.inference.engine import HEAD_ROWS, Engine, Package, Slots
from castalia.inference.exported import ExportFolder
from castalia.inference.implements import ATTENTION, SIZES, Values, mixed_windows, patterned
from castalia.models.config import require_transformer
from castalia.models.model_config import ModelConfig
from castalia.models.parts.frequencies import yarn_factor
from castalia.models.windows import window
from castalia.tokenizers.tokenizer import Tokenizer

OPTIONS: dict[str, Values] = SIZES | {
    "family": ATTENTION,
    "activation": (
        *("gelu", "gelu_tanh", "relu", "swish", "silu"),
        *("geglu", "geglu_tanh", "reglu", "swiglu", "glu"),
    ),
    "norm": ("layernorm", "rmsnorm", "non_parametric_layernorm"),
    "qk_norm": ("none", "head"),
    "parallel_residual": (True, False),
    "shared_norm": (True, False),
    "pos_emb": ("rotary", "alibi", "learned", "sinusoidal"),
    "rotary_pct": None,
    "rotary_emb_base": None,
    "rope_numerics": ("fp32", "neox_v1_fp16"),
    "rope_scaling": (None, "linear", "ntk", "yarn", "llama3"),
    "learned_offset": None,
    "alibi_scaled": (True, False),
    "alibi_numerics": ("fp32", "bf16"),
    "sliding_window": None,
    "attention_config": None,
    "embedding_multiplier": None,
    "output_multiplier": None,
}
"""Options that CTranslate2's TransformerDecoderSpec expresses."""


class Ct2Slots(Slots):
    """The tokens of every slot; the library keeps no other state between calls."""

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
    """A CTranslate2 folder on the CPU, with the tokenizer that the weights were trained with.

    Takes   threads: the library's threads; None for as many as torch uses, 0 for the library's
            default.
    Raises  ConfigError if ctranslate2 is not installed; CheckpointError if the folder is not a
            CTranslate2 model.
    """

    name = "ct2"
    implements = OPTIONS
    export_kind = "ct2"
    batching = "whole texts, greedy only; else every step reads the text again"
    scores = "in its own arithmetic"
    package = Package("ctranslate2", "ct2")

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(config)
        library = require("ctranslate2", "ct2", "running a CTranslate2 model")
        if threads is None:
            threads = torch.get_num_threads()
        self.tokenizer = tokenizer
        try:
            self.generator = library.Generator(str(folder), device="cpu", intra_threads=threads)
            listed = (Path(folder) / "vocabulary.json").read_text(encoding="utf-8")
            self.vocabulary: list[str] = json.loads(listed)
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"cannot load {folder} in CTranslate2: {error}") from None
        self.window = window(require_transformer(config, self.name))
        # Padding rows of the embedding have names in the vocabulary and must never be chosen.
        self.padding = [[token] for token in self.vocabulary[tokenizer.vocab_size :]]

    @classmethod
    def refuses(cls, config: ModelConfig) -> str | None:
        """See `Engine`."""
        reason = super().refuses(config)
        if reason is not None:
            return reason
        model = require_transformer(config, cls.name)
        if model.pos_emb == "rotary" and not model.rotary_dim:
            return "CTranslate2 cannot express rotary_pct=0: it reads 0 as the whole head"
        if patterned(model) or mixed_windows(model):
            return (
                f"CTranslate2 cannot express attention_config={model.attention_config!r}: all its"
                " layers have one sliding_window"
            )
        scaling = model.rope_scaling
        yarn = scaling is not None and scaling.kind == "yarn" and yarn_factor(scaling) != 1
        if yarn and model.rotary_dim != model.head_dim:
            return (
                "CTranslate2 cannot express rope_scaling.attention_factor with"
                f" rotary_pct={model.rotary_pct}: it scales whole heads"
            )
        return None

    @classmethod
    def from_export(cls, export: ExportFolder, dtype: str | None) -> "Ct2Engine":
        """See `Engine`.

        Raises  ConfigError if the export has no tokenizer.
        """
        if export.tokenizer is None:
            raise ConfigError(
                f"{export.folder} has no {TOKENIZER}; CTranslate2 finds tokens by their text"
            )
        return cls(export.folder, export.config, export.tokenizer)

    @property
    def numbers(self) -> str:
        """What the library computes in on this machine."""
        return str(self.generator.compute_type)

    def slots(self, count: int, length: int) -> Ct2Slots:
        """See `Engine`."""
        return Ct2Slots(self, count, length)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        out = self.generator.forward_batch([self.tokens(ids)])
        return torch.from_numpy(np.array(out))[0].float()

    def logits_in_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """See `Engine`; the library computes all of them at once."""
        yield from self.logits(ids).split(HEAD_ROWS)

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`; by the library's own scoring, which holds no logits of whole texts."""
        # The library's default cuts a text at 1024 tokens without a warning; 0 does not.
        (result,) = self.generator.score_batch([self.tokens(ids)], max_input_length=0)
        return torch.tensor([float(value) for value in result.log_probs])

    def greedy(
        self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], ends: Sequence[int]
    ) -> list[list[int]]:
        """See `Engine`."""
        results = self.generator.generate_batch(
            [self.tokens(ids) for ids in prompts],
            # In one batch, rows of unequal length would be forced through the model token by token.
            max_batch_size=1,
            max_length=max(budgets),
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=list(ends),
            suppress_sequences=self.padding or None,
        )
        return [
            list(result.sequences_ids[0])[:budget]
            for result, budget in zip(results, budgets, strict=True)
        ]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the library spells them.

        Raises  ConfigError for more tokens than the sliding window holds: the library lets tokens
                of a prompt, or of a text that it scores, see further back than the window.
        """
        if self.window is not None and len(ids) > self.window:
            raise ConfigError(
                f"CTranslate2 cannot read {len(ids)} tokens at once in a model with"
                f" sliding_window={self.window}; shorten the text, or use engine=torch"
            )
        return [self.vocabulary[i] for i in ids]
