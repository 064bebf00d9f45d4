"""Presets as data; `resolve` turns a preset, files and overrides into one config."""

from castalia.recipes.load import Resolved, load_config, resolve
from castalia.recipes.presets import preset, preset_names

__all__ = ["Resolved", "load_config", "preset", "preset_names", "resolve"]
