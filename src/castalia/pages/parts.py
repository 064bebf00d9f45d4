"""A config's sections as the parts of a page: what all kinds of a section have, some, and one.

`castalia.config.reference` merges the kinds of a section into one list, for the screen; a page has
room for a table of each.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from castalia.config.fields import kind_of, sections
from castalia.config.kinds import Kind
from castalia.config.reference import Entry, entry_of, first_paragraph, labelled

Options = dict[str, Entry]
"""Dotted key -> option."""


class Part(NamedTuple):
    """A heading of the page and the options below it."""

    name: str
    """Dotted name of the section; empty for the options of no section."""
    kinds: tuple[str, ...]
    """The kinds of the section that alone have these options; empty for those that all have."""
    text: str
    """What the section or the kind is."""
    entries: list[Entry]
    defaults: dict[str, str]
    """Of one kind: option -> its default, where the option's table has another."""


def parts_of(root: type[BaseModel]) -> list[Part]:
    """The parts of a config of class `root`, first the options of no section."""
    plain = [
        entry_of(root, name, field)
        for name, field in root.model_fields.items()
        if not sections(field)
    ]
    parts = [Part("", (), "", plain, {})]
    for name, field in root.model_fields.items():
        parts += section_parts(root, name, field)
    return parts


def section_parts(root: type[BaseModel], name: str, field: FieldInfo) -> Iterator[Part]:
    """The parts of the section `name`, then those of the sections inside."""
    classes = labelled(field, sections(field))
    if not classes:
        return
    kind = kind_of(field)
    if kind is None:
        entries = list(direct(root, name, classes[0][1]).values())
        yield Part(name, (), first_paragraph(classes[0][1].__doc__), entries, {})
    else:
        yield from kind_parts(root, name, kind, dict(classes))
    inside: dict[str, FieldInfo] = {}
    for _, cls in classes:
        for inner, inner_field in cls.model_fields.items():
            inside.setdefault(inner, inner_field)
    for inner, inner_field in inside.items():
        yield from section_parts(root, f"{name}.{inner}", inner_field)


def direct(root: type[BaseModel], name: str, cls: type[BaseModel]) -> Options:
    """The options of a section of class `cls`, without those of the sections inside."""
    every = [entry_of(root, f"{name}.{key}", field) for key, field in cls.model_fields.items()]
    return {entry.key: entry for entry in every}


def kind_parts(
    root: type[BaseModel], name: str, kind: Kind, classes: dict[str, type[BaseModel]]
) -> Iterator[Part]:
    """The parts of a section with kinds: what all have, what several have, then each kind."""
    chooser = f"{name}.{kind.key}"
    by_kind = {label: direct(root, name, cls) for label, cls in classes.items()}
    menu = " | ".join(sorted(classes))
    chosen = next(iter(by_kind.values()))[chooser]
    first = chosen._replace(values=menu, text=f"The {kind.registry.kind}.")
    for options in by_kind.values():
        del options[chooser]
    groups = grouped(by_kind)
    everywhere = groups.pop(tuple(by_kind), [])
    text = ""
    if len(classes) > 1:
        text = f"One of {len(classes)} kinds, which `{chooser}` names."
    yield Part(name, (), text, [first, *everywhere], {})
    for labels, entries in sorted(groups.items(), key=lambda group: -len(group[0])):
        if len(labels) > 1:
            yield Part(name, labels, "", entries, {})
    for label, cls in classes.items():
        # An option's table has the default of the first of its kinds.
        shown = {
            entry.key: entry
            for labels, entries in [((label,), everywhere), *groups.items()]
            for entry in entries
            if label in labels
        }
        defaults = {
            key: entry.default
            for key, entry in by_kind[label].items()
            if entry.default != shown[key].default
        }
        yield Part(name, (label,), kind_text(kind, cls), groups.get((label,), []), defaults)


def grouped(by_kind: dict[str, Options]) -> dict[tuple[str, ...], list[Entry]]:
    """The options by the kinds that have them with one type and meaning."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    first: dict[tuple[str, str, str], Entry] = {}
    for label, options in by_kind.items():
        for entry in options.values():
            option = (entry.key, entry.values, entry.text)
            kinds.setdefault(option, []).append(label)
            first.setdefault(option, entry)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for option, labels in kinds.items():
        groups.setdefault(tuple(labels), []).append(first[option])
    return groups


def kind_text(kind: Kind, cls: type[BaseModel]) -> str:
    """What a kind is: the docstring of its chooser, such as a family's name, or of its class."""
    chooser = cls.model_fields[kind.key]
    return first_paragraph(chooser.description or cls.__doc__)
