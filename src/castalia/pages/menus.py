"""Options whose values are names of things that are described in code: mixers, schedules, ..."""

import inspect
from typing import Any

from castalia.config.reference import first_paragraph
from castalia.pages.markdown import code, table


def menus(key: str) -> list[str]:
    """The lines that describe the values of the option `key`; none for most."""
    members = members_of(key)
    if not members:
        return []
    rows = []
    for name, member in members.items():
        own = ", ".join(code(option) for option in options_of(key, member))
        rows.append([code(name), own, first_paragraph(member.__doc__)])
    return [*table([f"`{key}`", "its own options", "what it is"], rows), ""]


def members_of(key: str) -> dict[str, Any]:
    """Name -> class or function of each value of the option `key`."""
    if key == "mixing.kind":
        import castalia.mixing
        from castalia.mixing.mixer import MIXERS

        assert castalia.mixing  # its import registers the mixers
        return {name: MIXERS[name] for name in MIXERS}
    if key == "schedule.name":
        from castalia.optim.shapes import SHAPES

        return dict(SHAPES)
    return {}


def options_of(key: str, member: Any) -> list[str]:
    """The options that a mixer has for itself; schedules name theirs in the table of options."""
    if key != "mixing.kind":
        return []
    from castalia.mixing.config import OWN

    return [f"mixing.{name}" for name in inspect.signature(member).parameters if name in OWN]
