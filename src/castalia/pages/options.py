"""The page of every option of a config, from the config classes."""

import re
from collections.abc import Sequence

from castalia.config.neox_paths import neox_names
from castalia.config.reference import Entry
from castalia.pages.markdown import anchor, code, counted, table
from castalia.pages.menus import menus
from castalia.pages.parts import Part, parts_of

HEAD = """\
# Options

This page is generated from the config classes by `make docs`. On the command line an option is set
as `key=value`, in a file by nesting: `optim.lr=3e-4` is `optim: {lr: 3e-4}`.
`castalia show --keys optim` prints one section, `castalia show CONFIG --all` the values of a
config. [Config](config.md) says how presets, files and overrides combine, and
[GPT-NeoX's arguments](gpt-neox-options.md) lists the options by GPT-NeoX's names.

An option marked *resume* may change when a run is resumed; any other is fixed for the whole run.

Some sections have kinds, such as `optim.kind`. Their first table has the options of all kinds; the
tables after it have those of several kinds or of one. Defaults are those of the first kind in the
title of a table. A kind with other defaults lists them.
"""
TITLES = ("option", "type, unit", "default", "meaning")
READERS = re.compile(
    r" *(?:Only [^ ]+(?: and [^ ]+)? reads? these fields"
    r"|`castalia train` reads these fields in [^ ]+ alone|Read by [^ ]+"
    r"|Training itself reads none of these fields)\.(?= |$)"
)
"""Sentences of a docstring that are for readers of the code."""


def options_page() -> str:
    """The page with all sections."""
    return page_of([])


def page_of(names: Sequence[str]) -> str:
    """The page with the sections `names` alone, by default with all."""
    from castalia.runs.config import RunConfig

    parts = [part for part in parts_of(RunConfig) if chosen(part, names)]
    lines = [HEAD, summary(parts), *contents(parts)]
    for part in parts:
        lines += part_lines(part)
    return "\n".join([*lines, ""]).rstrip() + "\n"


def chosen(part: Part, names: Sequence[str]) -> bool:
    """Whether a part is one of the sections `names` or inside one; all are without names."""
    return not names or any(f"{part.name}.".startswith(f"{name}.") for name in names)


def summary(parts: list[Part]) -> str:
    """How many options there are."""
    keys = {entry.key for part in parts for entry in part.entries}
    kinds = sum(len(part.kinds) == 1 for part in parts)
    return f"{counted(len(keys), 'option')}, {counted(kinds, 'kind')} of sections.\n"


def contents(parts: list[Part]) -> list[str]:
    """A line for each section at the top, with its kinds and the sections inside it."""
    inside: dict[str, list[str]] = {}
    for part in parts:
        links = inside.setdefault(part.name.partition(".")[0], [])
        # A group of kinds stands before the kinds themselves.
        if len(part.kinds) < 2:
            links.append(f"[{short_title(part)}](#{anchor(title(part))})")
    lines = []
    for first, *others in inside.values():
        lines.append(f"- {first}: {', '.join(others)}" if others else f"- {first}")
    return [*lines, ""]


def title(part: Part) -> str:
    """The text of a heading."""
    if part.kinds:
        return f"`{part.name}`: {', '.join(map(code, part.kinds))}"
    return code(part.name) or "Without a section"


def short_title(part: Part) -> str:
    """A heading in the contents, below the name of its section."""
    if part.kinds:
        return part.kinds[0]
    return part.name or "Without a section"


def part_lines(part: Part) -> list[str]:
    """A heading, what the section is, GPT-NeoX's names for it, and its options."""
    level = "##"
    # Kinds and sections within sections are one level below those of the config.
    if part.kinds or "." in part.name:
        level = "###"
    lines = [f"{level} {title(part)}", ""]
    text = READERS.sub("", part.text)
    if text:
        lines += [text, ""]
    names = []
    if part.name and not part.kinds:
        names = neox_names().get(part.name, [])
    if names:
        lines += [f"GPT-NeoX: {', '.join(map(code, names))}.", ""]
    if part.defaults:
        pairs = ", ".join(code(f"{key}={value}") for key, value in part.defaults.items())
        lines += [f"Other defaults: {pairs}.", ""]
    if part.entries:
        lines += [*table(TITLES, map(row, part.entries)), ""]
    elif len(part.kinds) == 1:
        lines += ["All its options are in the tables above.", ""]
    for entry in part.entries:
        lines += menus(entry.key)
    return lines


def row(entry: Entry) -> list[str]:
    """An option as a row of the table."""
    # Four columns: more of them leave no width for the last, which has sentences.
    kind = entry.values
    if entry.unit:
        kind += f", {entry.unit}"
    default = entry.default
    # "required" is a word about the default, and no value.
    if default != "required":
        default = code(default)
    text = entry.text
    if entry.at_resume:
        text += " *resume*"
    if entry.neox:
        text += f" GPT-NeoX: {', '.join(map(code, entry.neox))}."
    return [code(entry.key), kind, default, text]
