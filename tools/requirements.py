"""Print what Castalia needs, a requirement a line: `python requirements.py hf,serve`.

So that an image can have the packages in a layer below the sources. Reads pyproject.toml beside it
or in the working directory; needs nothing but Python's standard library.
"""

import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OWN = "castalia["
"""Beginning of a requirement that is extras of Castalia itself."""


def requirements(project: Mapping[str, Any], extras: list[str]) -> list[str]:
    """The requirements of the package and of its extras, each once.

    Raises  SystemExit naming an extra that does not exist.
    """
    return list(dict.fromkeys([*project["dependencies"], *of_extras(project, extras)]))


def of_extras(project: Mapping[str, Any], extras: list[str]) -> Iterator[str]:
    """The requirements of extras; those that are extras themselves are resolved."""
    known = project["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            sys.exit(f"unknown extra {extra!r}; choose of {', '.join(known)}")
        for need in known[extra]:
            if need.startswith(OWN):
                yield from of_extras(project, names(need[len(OWN) : -1]))
            else:
                yield need


def names(text: str) -> list[str]:
    """The words of a list between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def pyproject() -> Path:
    """pyproject.toml in the working directory, else in the folder above this one."""
    here = Path("pyproject.toml")
    return here if here.is_file() else Path(__file__).resolve().parents[1] / "pyproject.toml"


if __name__ == "__main__":
    project = tomllib.loads(pyproject().read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(project, names(sys.argv[1] if len(sys.argv) > 1 else ""))))
