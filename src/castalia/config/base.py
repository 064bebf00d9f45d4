"""`Config`: the base of every config class. Strict about names, and all problems come out at once."""

from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from castalia.config.kinds import Kind
from castalia.core.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Frozen, refuses unknown keys; each field's docstring is its help and stands in the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Problem(NamedTuple):
    """One thing that is wrong with a config."""

    key: str
    """Dotted key, empty for a rule that spans the whole config."""
    text: str
    """What is wrong, with the key in front."""
    unknown: bool = False
    """The key does not exist."""
    missing: bool = False
    """The key has no value and needs one."""


def build(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config of class `kind` out of nested `values`.

    Raises  ConfigError with one line a problem: dotted key, what is wrong, what was given, the nearest right name.
    """
    config, problems = check(kind, values)
    if config is None:
        raise ConfigError(report([problem.text for problem in problems], where))
    return config


def report(lines: list[str], where: str) -> str:
    """The message of a ConfigError that lists every problem: a headline, then one line each."""
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return f"{count} in the config ({where}):\n" + "\n".join(f"  {line}" for line in lines)


def check(kind: type[C], values: dict[str, Any]) -> tuple[C | None, list[Problem]]:
    """The config of class `kind`, or None and every problem that stands in its way."""
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, [problem_of(kind, item, values) for item in error.errors(include_url=False)]


def problem_of(kind: type[Config], item: Any, values: Any = None) -> Problem:
    """What one pydantic error says, in our words."""
    path = [part for part in item["loc"] if isinstance(part, str | int)]
    key = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        return Problem(key, f"{key}: unknown key{hint_for(kind, path, values)}", unknown=True)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "unknown_kind":
        key = f"{key}.{item['ctx']['key']}"
    if item["type"] in ("value_error", "missing", "unknown_kind", "section"):
        return Problem(
            key, f"{key}: {message}" if key else message, missing=item["type"] == "missing"
        )
    return Problem(key, f"{key}: {message}, got {item['input']!r}")


def hint_for(kind: type[Config], path: list[Any], values: Any = None) -> str:
    """Where the unknown key at `path` may have been meant to stand: the same name elsewhere, a near one, the menu."""
    name = str(path[-1])
    elsewhere = [key for key in leaves(kind) if key.split(".")[-1] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    names = field_names(kind, path[:-1], values)
    return nearest(name, names) or f"; have: {', '.join(names)}"


def field_names(kind: type[Config], path: list[Any], values: Any = None) -> list[str]:
    """Names of the fields of the config section at `path` below `kind`.

    Where a section's class is chosen by name (see `castalia.config.kinds`), `values` tell which it is.
    """
    for part in path:
        field = kind.model_fields.get(str(part))
        values = values.get(part) if isinstance(values, dict) else None
        classes = sections(field, values) if field else []
        if not classes:
            return []
        kind = classes[0]
    return list(kind.model_fields)


def sections(field: FieldInfo, values: Any = None) -> list[type[Config]]:
    """The config classes that a field may hold, the one that `values` choose or the default first; [] for a value."""
    for marker in field.metadata:
        if isinstance(marker, Kind):
            classes = marker.classes()
            name = values.get(marker.key) if isinstance(values, dict) else None
            chosen = classes.get(str(name), classes[marker.default])
            others = [other for other in classes.values() if other is not chosen]
            return [chosen, *others]  # type: ignore[list-item]
    options = [field.annotation, *get_args(field.annotation)]
    return [option for option in options if isinstance(option, type) and issubclass(option, Config)]


def leaves(kind: type[Config], prefix: str = "") -> list[str]:
    """Dotted names of every value below `kind`, in order, each once."""
    out: dict[str, None] = {}
    for name, field in kind.model_fields.items():
        inner = sections(field)
        for section in inner:
            out |= dict.fromkeys(leaves(section, f"{prefix}{name}."))
        if not inner:
            out[f"{prefix}{name}"] = None
    return list(out)


class Dumper(yaml.SafeDumper):
    """SafeDumper that writes a list of plain values on one line."""


def represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    """`[0, 1, 2]` in place of a line for each number."""
    flat = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


Dumper.add_representer(list, represent_list)


def dump_yaml(config: Config) -> str:
    """The whole config as YAML text, in the order of the fields; `read_yaml` of it builds an equal config."""
    text: str = yaml.dump(
        config.model_dump(mode="json"),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return text
