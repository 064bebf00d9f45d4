"""The pydantic base, YAML files, dotted overrides and the key table of GPT-NeoX YAML."""

from castalia.config.base import Config, build, dump_yaml
from castalia.config.values import apply_overrides, flatten, is_override, merge, read_yaml

__all__ = [
    "Config",
    "apply_overrides",
    "build",
    "dump_yaml",
    "flatten",
    "is_override",
    "merge",
    "read_yaml",
]
