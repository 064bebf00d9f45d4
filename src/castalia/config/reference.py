"""The keys of a config as a reference: full name, values, default, meaning."""

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from castalia.config.changes import may_change
from castalia.config.fields import kind_of, sections
from castalia.config.neox_paths import neox_names
from castalia.config.units import unit_of

WORDS = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    dict: "mapping",
    type(None): "null",
}
"""A type as a user knows it from YAML."""
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class Entry(NamedTuple):
    """One key of a config."""

    key: str
    """Dotted name."""
    values: str
    """What it takes: `integer > 0`, `fp32 | bf16 | fp16`."""
    default: str
    """As YAML has it; `required` without one, `a section` for a list of sections."""
    text: str
    """Its meaning, in one paragraph."""
    at_resume: bool
    """Whether it may change when a run is resumed."""
    unit: str
    """Unit of a number, as its docstring gives it; empty without one."""
    neox: tuple[str, ...]
    """GPT-NeoX's names for it."""


class Section(NamedTuple):
    """A section of a config and the keys in it."""

    name: str
    """Dotted name; empty for the keys of no section."""
    text: str
    """First paragraph of the docstring of its class."""
    entries: list[Entry]


def reference(root: type[BaseModel]) -> list[Section]:
    """The sections of a config of class `root`, first the keys of no section."""
    all_sections = [Section("", first_paragraph(root.__doc__), [])]
    for name, field in root.model_fields.items():
        inner = sections(field)
        if not inner:
            all_sections[0].entries.append(entry_of(root, name, field))
            continue
        entries = list(within(root, field, f"{name}."))
        all_sections.append(Section(name, first_paragraph(inner[0].__doc__), entries))
    return all_sections


def within(root: type[BaseModel], field: FieldInfo, prefix: str) -> Iterator[Entry]:
    """The keys below a section, or below those of a list; one entry for a key of several kinds."""
    by_key: dict[str, list[tuple[str, Entry]]] = {}
    kinds = labelled(field, sections(field))
    for label, kind in kinds:
        for entry in below(root, kind, prefix):
            by_key.setdefault(entry.key, []).append((label, entry))
    usual = kinds[0][0] if kinds else ""
    in_list = get_origin(field.annotation) is list and kind_of(field) is not None
    for found in by_key.values():
        # In a list no kind is the usual one: a key that some lack has their names.
        named = in_list and len(found) < len(kinds)
        yield merged(found, "" if named else usual)


def labelled(field: FieldInfo, classes: list[type[BaseModel]]) -> list[tuple[str, type[BaseModel]]]:
    """The classes of a section with the names that choose them; empty without a choice."""
    kind = kind_of(field)
    names = {} if kind is None else {cls: name for name, cls in kind.classes().items()}
    return [(names.get(cls, ""), cls) for cls in classes]


def merged(found: list[tuple[str, Entry]], default: str) -> Entry:
    """One entry for a key of several kinds of a section, with their names: the first's, with the
    choices of all, and the defaults and meanings that differ. `default` is the kind that a section
    has without a word."""
    first = found[0][1]
    words = " | ".join(entry.values for _, entry in found).split(" | ")
    # The chooser: each kind knows its own name alone.
    if all(entry.values == entry.default == name for name, entry in found):
        return first._replace(values=" | ".join(sorted(words)))
    others = [f"{name}: {entry.default}" for name, entry in found if entry.default != first.default]
    by_text: dict[str, list[str]] = {}
    for name, entry in found:
        by_text.setdefault(entry.text, []).append(name)
    texts = [
        text if default in names else f"{', '.join(names)}: {text}"
        for text, names in by_text.items()
    ]
    return first._replace(
        values=" | ".join(dict.fromkeys(words)),
        default="; ".join([first.default, *others]),
        text=" ".join(texts),
    )


def entries(root: type[BaseModel]) -> list[Entry]:
    """Every key of a config of class `root`."""
    return [entry for section in reference(root) for entry in section.entries]


def below(root: type[BaseModel], kind: type[BaseModel], prefix: str) -> Iterator[Entry]:
    """The keys of a section of class `kind`, and of the sections in it."""
    for name, field in kind.model_fields.items():
        yield entry_of(root, f"{prefix}{name}", field)
        yield from within(root, field, f"{prefix}{name}.")


def entry_of(root: type[BaseModel], key: str, field: FieldInfo) -> Entry:
    """The entry of one field."""
    # Only the chooser of a section whose docstring says all has none of its own.
    text = one_line(field.description) or "Name of the member that the section is for."
    values = values_of(field)
    unit = unit_of(text) if "integer" in values or "number" in values else ""
    names = tuple(neox_names().get(key, ()))
    return Entry(key, values, default_of(field), text, may_change(root, key), unit, names)


def values_of(field: FieldInfo) -> str:
    """What a field takes."""
    if kind_of(field) is not None or sections(field):
        if get_origin(field.annotation) is list:
            return "list of sections"
        return "section | null" if type(None) in get_args(field.annotation) else "section"
    text = type_text(field.annotation)
    bounds = bounds_of(field.metadata)
    if not bounds:
        return text
    # The bound is that of the number, wherever null stands.
    words = text.split(" | ")
    return " | ".join([f"{words[0]} {bounds}", *words[1:]])


def type_text(annotation: Any) -> str:
    """A type in the words of YAML: `list of text | null`."""
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(option) for option in inner))
    if origin in (list, tuple):
        return f"list of {type_text(inner[0])}"
    if hasattr(annotation, "__metadata__"):  # Annotated[int, Gt(0)]
        text = type_text(inner[0])
        return f"{text} {bounds_of(annotation.__metadata__)}".strip()
    return WORDS.get(origin or annotation, "section" if is_section(annotation) else "value")


def is_section(annotation: Any) -> bool:
    """Whether a type is a config class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def bounds_of(marks: Any) -> str:
    """`>= 0, < 1` for the bounds among the marks of a type."""
    texts = []
    for mark in marks:
        # A FieldInfo carries its bounds as marks of its own.
        for inner in getattr(mark, "metadata", [mark]):
            for name, sign in BOUNDS.items():
                bound = getattr(inner, name, None)
                if bound is not None:
                    texts.append(f"{sign} {bound:g}")
    return ", ".join(texts)


def default_of(field: FieldInfo) -> str:
    """The default as YAML has it on one line."""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json")
    if isinstance(default, list | tuple):
        default = [
            item.model_dump(mode="json") if isinstance(item, BaseModel) else item
            for item in default
        ]
    if isinstance(default, str):
        return default or '""'
    if isinstance(default, float):
        return f"{default:g}"
    return json.dumps(default)


def one_line(text: str | None) -> str:
    """A docstring without the line breaks of the source."""
    return " ".join((text or "").split())


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return one_line((text or "").strip().split("\n\n")[0])
