"""Names of a room that are imported when they are first asked for, so that what is light stays quick to load."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`: public name -> the submodule that has it.

    Raises  AttributeError for any other name, as a plain module does.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    return get
