"""The architectures of transformers that Castalia reads and writes, and which one a model gets."""

from typing import NamedTuple

from castalia.checkpoint.hf.falcon import FalconFormat
from castalia.checkpoint.hf.format import HfFormat, TransformerFormat
from castalia.checkpoint.hf.gpt2 import Gpt2Format
from castalia.checkpoint.hf.granite import GraniteFormat
from castalia.checkpoint.hf.llama import LlamaFormat
from castalia.checkpoint.hf.mamba import MambaFormat
from castalia.checkpoint.hf.mamba2 import Mamba2Format
from castalia.checkpoint.hf.mistral import MistralFormat
from castalia.checkpoint.hf.mixtral import MixtralFormat, OlmoeFormat
from castalia.checkpoint.hf.neox import NeoxFormat
from castalia.checkpoint.hf.olmo2 import Olmo2Format, OlmoFormat
from castalia.checkpoint.hf.qwen2 import Qwen2Format, Qwen3Format
from castalia.checkpoint.hf.qwen2_moe import Qwen2MoeFormat
from castalia.checkpoint.hf.stablelm import StableLmFormat
from castalia.core.errors import ConfigError
from castalia.core.registry import Registry
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig

HF: Registry[HfFormat] = Registry("Hugging Face architecture")
"""Formats by transformers' `model_type`. A package of another family registers its own here."""
for form in (
    NeoxFormat(),
    LlamaFormat(),
    MistralFormat(),
    Qwen2Format(),
    Qwen3Format(),
    Olmo2Format(),
    FalconFormat(),
    Gpt2Format(),
    StableLmFormat(),
    OlmoFormat(),
    GraniteFormat(),
    MixtralFormat(),
    OlmoeFormat(),
    Qwen2MoeFormat(),
    MambaFormat(),
    Mamba2Format(),
):
    HF.register(form.model_type)(form)


WHOLE = frozenset({"moe", "moe=null"})
"""What an architecture without experts lacks of a model with some, and the other way round."""


class Choice(NamedTuple):
    """An architecture, and the options of a model that it lacks."""

    form: HfFormat
    lacks: list[str]


def best_format(config: ModelConfig) -> Choice:
    """The architecture that expresses a model, or the one that lacks least.

    Those of the model's family come first, so that a folder that is read is written as it was. A
    model of one family that is a model of another, such as GPT-NeoX's with all options of LLaMA, is
    written as that one.
    Raises  ConfigError if the family is not one of attention and MLP blocks and has no format.
    """
    formats = [HF[name] for name in HF]
    own = [form for form in formats if config.family in form.families]
    others: list[HfFormat] = []
    if isinstance(config, TransformerConfig):
        # Other formats read the options of their own families alone.
        others = [
            form for form in formats if form not in own and isinstance(form, TransformerFormat)
        ]
    choices = [Choice(form, form.lacks(config)) for form in (*own, *others)]
    if not choices:
        known = sorted({family for form in formats for family in form.families})
        raise ConfigError(
            f"no Hugging Face format is known for model family {config.family!r}; known:"
            f" {', '.join(known)}"
        )
    # The first of those that lack least: `min` keeps the order. Among equals one with experts for a
    # model with experts, so that the option is named that it lacks of them.
    return min(choices, key=lambda choice: (len(choice.lacks), not WHOLE.isdisjoint(choice.lacks)))


def chosen_format(config: ModelConfig) -> HfFormat:
    """The architecture that a model is written as.

    Raises  ConfigError naming the options that no architecture of transformers has together.
    """
    form, lacks = best_format(config)
    if not lacks:
        return form
    raise ConfigError(
        "no Hugging Face architecture can express this model; the nearest,"
        f" {form.architectures[0]}, cannot express {' and '.join(lacks)}"
    )
