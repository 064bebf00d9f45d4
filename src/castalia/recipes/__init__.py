"""Presets as data; `resolve` turns a preset, files and overrides into one config."""

from castalia.recipes.load import Resolved, load_config, resolve
from castalia.recipes.presets import preset, preset_names
from castalia.recipes.words import in_folder

__all__ = ["Resolved", "in_folder", "load_config", "preset", "preset_names", "resolve"]
