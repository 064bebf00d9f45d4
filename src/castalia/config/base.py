"""`Config`: the base of every config class, strict about keys; all problems come out at once."""

from collections.abc import Iterator
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from castalia.config.problems import Problem, problems_of
from castalia.core.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Frozen and strict about keys; the docstring of a field is its help and its schema's text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    def __str__(self) -> str:
        return repr(self)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What differs from the defaults: the rest of a config hides what makes it this one."""
        for name, value in super().__repr_args__():
            field = type(self).model_fields.get(str(name))
            if field is None or value != field.get_default(call_default_factory=True):
                yield name, value


def build(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config of class `kind` out of nested `values` that come from `where`.

    Raises  ConfigError with one line a problem: dotted key, expected, got, the nearest right name.
    """
    config, problems = check(kind, values)
    if config is None:
        raise ConfigError(report([problem.text for problem in problems], where))
    return config


def report(lines: list[str], where: str) -> str:
    """The message of a ConfigError with every problem: a headline, then one line each."""
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{count} in the config ({where}):", *(f"  {line}" for line in lines)])


def check(kind: type[C], values: dict[str, Any]) -> tuple[C | None, list[Problem]]:
    """The config of class `kind`, or None and every problem of the values."""
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, problems_of(kind, error.errors(include_url=False), values)


class Dumper(yaml.SafeDumper):
    """SafeDumper that writes a list of plain values on one line."""


def represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    """`[0, 1, 2]` in place of a line for each number."""
    flat = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


Dumper.add_representer(list, represent_list)


def dump_yaml(config: Config) -> str:
    """The whole config as YAML in the order of its fields; reading it builds an equal config."""
    text: str = yaml.dump(
        config.model_dump(mode="json"),
        Dumper=Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return text
