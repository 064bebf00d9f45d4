"""Nested config values: YAML files and dotted overrides, as layers of which the later wins."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from castalia.core.errors import ConfigError

Values = dict[str, Any]


class Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number and `10:13` as text, as YAML 1.2 and every
    researcher do."""


# YAML 1.1, which SafeLoader follows, wants a dot and a signed exponent: `3e-4` would be text.
FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\d[\d_]*\.\d*"
    r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
# YAML 1.1 also counts in sixties: `10:13` would be 613. What the other forms of numbers match is
# read as before.
SIXTIES = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
INTEGER = re.compile(r"^[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][\d_]*|0x[\da-fA-F_]+)$")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in SIXTIES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises  ConfigError naming `where`, the line and the column.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        problem = str(getattr(error, "problem", error))
        mark = getattr(error, "problem_mark", None)
        if mark is not None:
            where += f" line {mark.line + 1}, column {mark.column + 1}"
        if "expected ',' or" in problem:
            problem += "; a comma is missing before this place"
        if "'\\t'" in problem:
            problem += "; indent by spaces, not by tabs"
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None


def read_yaml(path: str | Path) -> Values:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises  ConfigError if it is missing, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    try:
        # JSON that is indented by tabs is not YAML.
        values = json.loads(text.removeprefix("\ufeff"))
    except ValueError:
        values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of keys to values, got {type(values).__name__}"
        )
    return values


def merge(*layers: Mapping[str, Any]) -> Values:
    """Lay each layer over those before it: mappings merge by key, other values replace."""
    return reduce(lay_over, layers, {})


def lay_over(below: Values, above: Mapping[str, Any]) -> Values:
    """A copy of `below` with `above` laid over it."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = lay_over(merged[key], value)
        else:
            merged[key] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_override(text: str) -> bool:
    """Whether `text` has the form a.b=c."""
    return re.match(r"^[A-Za-z_][\w.\-]*=", text) is not None


def parse_override(text: str) -> Values:
    """The nested values of `a.b=c`; c is YAML (`3e-4`, `true`, `[1, 2]`, `null`, text).

    Raises  ConfigError if the right side is not valid YAML.
    """
    path, _, right = text.partition("=")
    value: Any = ""  # `a.b=` sets an empty text, where YAML would read null
    if right:
        value = parse_yaml(right, f"override {path!r}")
    for name in reversed(path.split(".")):
        value = {name: value}
    nested: Values = value
    return nested


@dataclass
class Layers:
    """The values of one config by origin, from the weakest to the strongest."""

    base: Values = field(default_factory=dict)
    """A preset's values."""
    files: Values = field(default_factory=dict)
    """Values of the files."""
    fitted: Values = field(default_factory=dict)
    """Values derived from the overrides where these alone would contradict the layers below."""
    overrides: list[Values] = field(default_factory=list)
    """Nested values of each override, in the order given."""

    def resolved(self) -> Values:
        """The values that hold."""
        return merge(self.base, self.files, self.fitted, *self.overrides)

    def overrides_key(self, key: str) -> bool:
        """Whether an override sets the dotted `key`."""
        return any(key in flatten(values) for values in self.overrides)
