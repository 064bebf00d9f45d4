"""Model families: config classes, blocks, and all that the rest of Castalia knows about them.

A family of another package registers itself in the same way and is then a valid `model.family`:

    FAMILIES.register("mine")(MyFamily())
"""

from collections.abc import Mapping
from typing import Any

from castalia.config.base import build
from castalia.core.registry import Registry
from castalia.models.families.base import Family
from castalia.models.families.falcon import Falcon
from castalia.models.families.gmlp import AmlpFamily, GmlpFamily
from castalia.models.families.gpt2 import Gpt2
from castalia.models.families.llama import Llama
from castalia.models.families.mamba import MambaFamily
from castalia.models.families.mamba2 import Mamba2Family
from castalia.models.families.mistral import Mistral
from castalia.models.families.neox import Neox
from castalia.models.families.olmo2 import Olmo2
from castalia.models.families.palm import Palm
from castalia.models.families.qwen2 import Qwen2
from castalia.models.families.rwkv import Rwkv6, Rwkv7
from castalia.models.model_config import ModelConfig

DEFAULT = "neox"
"""The family of a config that names none, as all did when there was one."""
FAMILIES: Registry[Family] = Registry("model family")
"""Every family by the name that `model.family` has."""
for family in (
    *(Neox(), Llama(), Mistral(), Falcon(), Palm(), Gpt2(), Olmo2(), Qwen2()),
    MambaFamily(),
    Mamba2Family(),
    GmlpFamily(),
    AmlpFamily(),
    Rwkv6(),
    Rwkv7(),
):
    FAMILIES.register(family.name)(family)


def family_of(config: ModelConfig) -> Family:
    """The family that a config belongs to: its costs, start weights, layouts and engines."""
    return FAMILIES[config.family]


def build_model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config for the values of a `model` section, of the class that its family declares.

    where   names the file in error messages.
    Raises  ConfigError for an unknown family, or with every problem of the values.
    """
    # Not `build(ModelConfig, …)`: the base class knows neither the family's options nor its checks.
    family = FAMILIES[str(values.get("family", DEFAULT))]
    return build(family.Config, dict(values), where)
