"""Public names imported on first use, so that a package stays quick to import."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`; `places` maps each public name to its submodule.

    `dir(package)` lists the names too, before anything is imported.
    Raises  AttributeError for any other name, as a plain module does.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package]
            )
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    own = vars(sys.modules[package])
    own["__dir__"] = lambda: sorted({*own, *places})
    return get
