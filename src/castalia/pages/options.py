"""The page of every option of a config, from the config classes."""

from castalia.config.reference import Entry, Section, reference

HEAD = """\
# Options

This page is generated from the config classes by `make docs`. On the command line an option is set
as `key=value`, in a file by nesting: `optim.lr=3e-4` is `optim: {lr: 3e-4}`.
`castalia show --keys optim` prints one section, `castalia show CONFIG --all` the values of a
config. [Config](config.md) says how presets, files and overrides combine. An option marked *resume*
may change when a run is resumed; any other is fixed for the whole run.
"""


def options_page() -> str:
    """The page with all sections."""
    from castalia.runs.config import RunConfig

    return page_of(reference(RunConfig))


def page_of(sections: list[Section]) -> str:
    """The page with the sections given."""
    return "\n".join([HEAD, *map(section_text, sections)])


def section_text(section: Section) -> str:
    """A section as a heading and a table."""
    title = f"`{section.name}`" if section.name else "Keys of no section"
    lines = [f"## {title}", ""]
    if section.name:
        lines += [section.text, ""]
    lines += ["| key | values | default | |", "|---|---|---|---|"]
    lines += [row(entry) for entry in section.entries]
    return "\n".join([*lines, ""])


def row(entry: Entry) -> str:
    """A key as a row of the table."""
    text = f"{entry.text} *resume*" if entry.at_resume else entry.text
    default = "required" if entry.default == "required" else f"`{entry.default}`"
    cells = [f"`{entry.key}`", entry.values, default, text]
    # A bar ends a cell, in code as well.
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
