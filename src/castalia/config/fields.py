"""The keys that a config class has: its sections, the names in each, and every leaf below it."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castalia.config.kinds import Kind, inside


def kind_of(field: FieldInfo) -> Kind | None:
    """The mark of a section whose class is chosen by name; None for any other field."""
    marks = [*field.metadata]
    for item in get_args(field.annotation):
        # Of a list of such sections each item has the mark.
        marks += getattr(item, "__metadata__", ())
    for mark in marks:
        if isinstance(mark, Kind):
            return mark
    return None


def sections(field: FieldInfo, values: Any = None) -> list[type[BaseModel]]:
    """The config classes that a field may hold, [] for a plain value.

    Where the class is chosen by name, the class that `values` choose (or the default) is first.
    """
    kind = kind_of(field)
    if kind is not None:
        chosen = kind.chosen(values)
        return [chosen, *(other for other in kind.classes().values() if other is not chosen)]
    options = [field.annotation, *get_args(field.annotation)]
    return [
        option for option in options if isinstance(option, type) and issubclass(option, BaseModel)
    ]


def field_at(root: type[BaseModel], path: list[str], values: Any = None) -> FieldInfo | None:
    """The field at `path` below the class `root`; None if the path leads nowhere."""
    field = None
    cls: type[BaseModel] | None = root
    for name in path:
        values = inside(values, name)
        if field is not None and name.isdecimal() and get_origin(field.annotation) is list:
            # One of a list of sections, by its place.
            cls = next(iter(sections(field, values)), None)
            continue
        if cls is None or name not in cls.model_fields:
            return None
        field = cls.model_fields[name]
        cls = next(iter(sections(field, values)), None)
    return field


def names_at(root: type[BaseModel], path: list[str], values: Any = None) -> list[str]:
    """Names of the fields of the section at `path` below `root`; `values` choose its class."""
    if not path:
        return list(root.model_fields)
    field = field_at(root, path, values)
    if field is None:
        return []
    for name in path:
        values = inside(values, name)
    for section in sections(field, values):
        return list(section.model_fields)
    return []


def leaves(root: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every value below `root`, in order, each once."""
    names: dict[str, None] = {}
    for name, field in root.model_fields.items():
        inner = sections(field)
        for section in inner:
            names |= dict.fromkeys(leaves(section, f"{prefix}{name}."))
        # A list of sections is a value too: overrides set it whole.
        if not inner or get_origin(field.annotation) is list:
            names[f"{prefix}{name}"] = None
    return list(names)
