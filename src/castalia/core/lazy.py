"""Public names imported on first use, so that a package stays quick to import."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`; `places` maps each public name to its submodule.

    Raises  AttributeError for any other name, as a plain module does.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    return get
