"""Where values come from: YAML files and dotted overrides, later over earlier."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from castalia.core.errors import ConfigError


class Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number, as YAML 1.2 and every researcher do."""


FLOAT = re.compile(
    r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\d[\d_]*\.\d*|\.inf|\.nan)$"
)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Raises  ConfigError naming `where`, the line and the column.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        spot = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", error))
        hint = "; a comma is missing before this place" if "expected ',' or" in problem else ""
        raise ConfigError(f"{where}{spot}: not valid YAML: {problem}{hint}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping.

    Raises  ConfigError if it is missing, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of keys to values, got {type(values).__name__}"
        )
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it: mappings merge by key, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def is_override(text: str) -> bool:
    """Whether `text` has the form a.b=c."""
    return re.match(r"^[A-Za-z_][\w.\-]*=", text) is not None


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Lay `a.b=c` overrides on nested values; the right side is YAML (`3e-4`, `true`, `[1, 2]`, `null`, text).

    Raises  ConfigError listing every override without `=` or with an empty key.
    """
    out = dict(values)
    overrides = list(overrides)
    wrong = [text for text in overrides if not is_override(text)]
    if wrong:
        raise ConfigError(f"not an override of the form a.b=c: {', '.join(map(repr, wrong))}")
    for text in overrides:
        path, _, right = text.partition("=")
        value: Any = parse_yaml(right, f"override {path!r}") if right else ""
        for part in reversed(path.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
