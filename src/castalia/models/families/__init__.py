"""Model families: a config class, the blocks and all that the rest of Castalia must know of them.

A family of another package registers itself the same way and is then valid as `model.family`:

    FAMILIES.register("mine")(MyFamily())
"""

from collections.abc import Mapping
from typing import Any

from castalia.config.base import build
from castalia.core.registry import Registry
from castalia.models.config import ModelConfig
from castalia.models.families.base import Family
from castalia.models.families.neox import Neox

DEFAULT = "neox"
"""The family of a config that names none, as all did when there was one."""
FAMILIES: Registry[Family] = Registry("model family")
FAMILIES.register("neox")(Neox())


def family_of(config: ModelConfig) -> Family:
    """The family that a config belongs to."""
    return FAMILIES[config.family]


def build_model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The config of the right family out of the values of a `model` section that come from `where`.

    Raises  ConfigError for an unknown family, or with every problem of the values.
    """
    family = FAMILIES[str(values.get("family", DEFAULT))]
    return build(family.Config, dict(values), where)
