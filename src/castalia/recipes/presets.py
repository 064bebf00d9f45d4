"""The presets by name: functions that return nested config values, the base layer of a config."""

from collections.abc import Callable
from typing import Any

from castalia.core.registry import Registry
from castalia.recipes.debug import FAMILIES, debug
from castalia.recipes.demo import demo
from castalia.recipes.finetuning import FINE_TUNING, fine_tuning
from castalia.recipes.mini import mini
from castalia.recipes.pythia import NAMES, VARIANTS, pythia
from castalia.recipes.zoo import MODELS, published

PRESETS: Registry[Callable[[str], dict[str, Any]]] = Registry("preset")

PRESETS.register("debug")(debug)
PRESETS.register("demo")(demo)
PRESETS.register("mini")(mini)
for known in FINE_TUNING:
    PRESETS.register(known)(fine_tuning)
for known in (*NAMES, *VARIANTS):
    PRESETS.register(known)(pythia)
for known in FAMILIES:
    PRESETS.register(known)(debug)
for known in MODELS:
    PRESETS.register(known)(published)


def preset(name: str) -> dict[str, Any]:
    """Nested values of the preset `name`, a fresh copy.

    Raises  ConfigError on an unknown name, with the list and the nearest.
    """
    return PRESETS[name](name)


def preset_names() -> list[str]:
    """Every preset's name, family by family, small to large."""
    return list(PRESETS)
