"""Soft prompts: vectors in front of every text train, the model is frozen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from castalia.adapters.config import ADAPTERS, Adapter, AdapterConfig, Whole
from castalia.models import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.models import Decoder


class SoftPromptConfig(AdapterConfig):
    """Trained vectors in place of the first tokens of every row."""

    kind: Literal["soft_prompt"] = "soft_prompt"
    """Name of the adapter."""
    # GPT-NeoX's defaults.
    tokens: PositiveInt = 10
    """Places of a row that the prompt takes; the last tokens of full rows make room for it."""
    init_ids: list[int] = []
    """Ids whose vectors the prompt begins with, again and again until it is full; [] draws it."""
    init_string: str | None = None
    """A text whose ids are init_ids, by data.tokenizer."""
    init_range: NonNegativeFloat = 0.5
    """A drawn prompt is uniform within this distance of 0."""


@ADAPTERS.register("soft_prompt")
class SoftPrompt(Adapter):
    """The vectors of the first places of a row, as they leave the embedding.

    Source  Lester et al. 2021, arXiv:2104.08691; the starts are those of GPT-NeoX.
    """

    Config = SoftPromptConfig
    own = ("prompt.weight",)

    @classmethod
    def room(cls, config: Any) -> int:
        """The places of the prompt."""
        return int(config.tokens)

    @classmethod
    def problems(cls, config: Any, model: ModelConfig) -> list[str]:
        """Ids outside the vocabulary, and a prompt that leaves no room for text."""
        problems = []
        if config.init_ids and config.init_string is not None:
            problems.append("adapter.init_ids and adapter.init_string are both given; keep one")
        if outside := [i for i in config.init_ids if not 0 <= i < model.vocab_size]:
            problems.append(
                f"adapter.init_ids {outside} are outside the vocabulary of {model.vocab_size} ids"
            )
        if config.tokens >= model.max_position_embeddings:
            problems.append(
                f"adapter.tokens {config.tokens} leaves no room for text in"
                f" model.max_position_embeddings {model.max_position_embeddings}; lower it"
            )
        return problems

    @classmethod
    def adapt(cls, model: "Decoder", config: Any) -> None:
        """Give the stage with the embedding its prompt."""
        from castalia.adapters.prompt_vectors import PromptVectors

        if model.span.first:
            model.prompt = PromptVectors(config.tokens, model.config.hidden_size)

    @classmethod
    def start(
        cls, config: Any, name: str, shape: Sequence[int], seed: int, whole: Whole
    ) -> "Tensor | None":
        """Vectors of the given ids, or uniform ones drawn from (seed, name)."""
        import torch

        from castalia.models.init import parameter_seed

        if name != "prompt.weight":
            return None
        if config.init_ids:
            ids = (config.init_ids * shape[0])[: shape[0]]
            return whole("embed.weight")[ids]
        generator = torch.Generator().manual_seed(parameter_seed(seed, name))
        drawn = torch.empty(tuple(shape))
        return drawn.uniform_(-config.init_range, config.init_range, generator=generator)
