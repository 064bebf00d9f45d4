"""`Config`: the base of every config class. Strict about names, and all problems come out at once."""

from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from castalia.core.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Frozen, refuses unknown keys; each field's docstring is its help and stands in the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def build(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config of class `kind` out of nested `values`.

    Raises  ConfigError with one line a problem: dotted key, what is wrong, what was given, the nearest right name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [problem_line(kind, item) for item in error.errors(include_url=False)]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{count} in the config ({where}):\n" + "\n".join(f"  {line}" for line in lines)) from None


def problem_line(kind: type[Config], item: Any) -> str:
    """One line for one pydantic error."""
    path = [part for part in item["loc"] if isinstance(part, str | int)]
    key = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        names = field_names(kind, path[:-1])
        hint = nearest(str(path[-1]), names) or f"; have: {', '.join(names)}"
        return f"{key}: unknown key{hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("value_error", "missing"):
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {item['input']!r}"


def field_names(kind: type[Config], path: list[Any]) -> list[str]:
    """Names of the fields of the config class that stands at `path` below `kind`."""
    for part in path:
        field = kind.model_fields.get(str(part))
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, Config)]
        if not inner:
            return []
        kind = inner[0]
    return list(kind.model_fields)


def dump_yaml(config: Config) -> str:
    """The whole config as YAML text, in the order of the fields; `read_yaml` of it builds an equal config."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return text
