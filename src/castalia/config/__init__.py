"""The pydantic base, YAML files, dotted overrides and the key table of GPT-NeoX YAML."""

from castalia.config.base import Config, build, dump_yaml
from castalia.config.values import Layers, flatten, is_override, merge, parse_override, read_yaml

__all__ = [
    "Config",
    "Layers",
    "build",
    "dump_yaml",
    "flatten",
    "is_override",
    "merge",
    "parse_override",
    "read_yaml",
]
