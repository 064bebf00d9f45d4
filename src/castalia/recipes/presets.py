"""The presets by name: functions that return nested config values, the base layer of a config."""

from collections.abc import Callable
from typing import Any

from castalia.core.registry import Registry
from castalia.recipes.debug import debug
from castalia.recipes.demo import demo
from castalia.recipes.pythia import NAMES, pythia

PRESETS: Registry[Callable[[str], dict[str, Any]]] = Registry("preset")

PRESETS.register("debug")(debug)
PRESETS.register("demo")(demo)
for known in NAMES:
    PRESETS.register(known)(pythia)


def preset(name: str) -> dict[str, Any]:
    """Nested values of the preset `name`, a fresh copy.

    Raises  ConfigError on an unknown name, with the list and the nearest.
    """
    return PRESETS[name](name)


def preset_names() -> list[str]:
    """Every preset's name, small to large."""
    return list(PRESETS)
