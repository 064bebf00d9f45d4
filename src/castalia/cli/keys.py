"""`castalia show --keys`: every key of a config, on the screen, as JSON and as the docs' page."""

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from castalia.config.reference import Entry, Section


def print_keys(names: list[str], *, as_json: bool, markdown: bool) -> None:
    """Print the keys of the sections `names`, by default of all.

    Raises  ConfigError for an unknown section or key.
    """
    from castalia.config.reference import reference
    from castalia.runs.config import RunConfig

    sections = chosen(reference(RunConfig), names)
    if as_json:
        entries = [entry._asdict() for section in sections for entry in section.entries]
        typer.echo(json.dumps(entries, indent=2))
    elif markdown:
        from castalia.pages.options import page_of

        typer.echo(page_of(names), nl=False)
    else:
        for section in sections:
            print_section(section)


def chosen(sections: "list[Section]", names: list[str]) -> "list[Section]":
    """The sections, or parts of them, whose dotted name is one of `names`; all without names.

    Raises  ConfigError for an unknown name, with the nearest.
    """
    from castalia.core.errors import ConfigError, nearest

    if not names:
        return sections
    known = [section.name for section in sections if section.name]
    known += [entry.key for section in sections for entry in section.entries]
    for name in names:
        if name not in known:
            menu = ", ".join(section.name for section in sections if section.name)
            raise ConfigError(
                f"no section or key {name!r}{nearest(name, known) or f'; sections: {menu}'}"
            )
    parts = []
    for section in sections:
        entries = [
            entry
            for entry in section.entries
            # With the dot: `optim` is no beginning of `optimizer`.
            if any(f"{entry.key}.".startswith(f"{name}.") for name in names)
        ]
        if entries:
            parts.append(section._replace(entries=entries))
    return parts


def print_section(section: "Section") -> None:
    """A section's name and meaning, then two lines a key, wrapped at the terminal's width."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = 1_000  # a pipe gets each text as one line, which grep can find
    if section.name:
        console.print(Text.assemble((section.name, "bold"), f"  {section.text}"))
    for entry in section.entries:
        console.print(Text.assemble("  ", (entry.key, "bold"), f"  {facts(entry)}"))
        console.print(Padding(Text(entry.text), (0, 0, 0, 6), expand=False))
    console.print()


def facts(entry: "Entry") -> str:
    """What a key takes, its default, whether it may change, its unit, GPT-NeoX's names."""
    text = f"{entry.values}, default {entry.default}"
    if entry.default == "required":
        text = f"{entry.values}, required"
    if entry.at_resume:
        text += ", may change at a resume"
    if entry.unit:
        text += f", unit {entry.unit}"
    if entry.neox:
        text += f", GPT-NeoX {' '.join(entry.neox)}"
    return text
