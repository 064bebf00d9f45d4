"""Functions of a user's own module by name: `module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from castalia.core.errors import ConfigError, nearest
from castalia.core.files import sha256_of


def named_function(name: str, option: str, example: str) -> Callable[..., Any]:
    """The function that `module:function` names; `option` asked for it, `example` is such a name.

    Raises  ConfigError saying which part could not be imported.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{option}: {name!r}: expected module:function, for instance {example}")
    # `python -m castalia` looks into the working directory, the installed command does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    # ImportError alone: any other error in the module is a bug, and its traceback shows where.
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{option}: {name!r}: cannot import the module {module!r}: {error}; run from the"
            " folder that holds it, or add that folder to PYTHONPATH"
        ) from None
    function = getattr(imported, attribute, None)
    if function is None:
        others = [other for other, value in vars(imported).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{option}: {name!r}: the module {module!r} has no function"
            f" {attribute!r}{nearest(attribute, others)}"
        )
    if not callable(function):
        raise ConfigError(f"{option}: {name!r}: {attribute} is not a function")
    chosen: Callable[..., Any] = function
    return chosen


def source_hash(function: Callable[..., Any], name: str) -> str:
    """SHA-256 of the file that defines the function `name`, which may then give other results.

    The whole file, since a function rarely stands alone. For what has no file, such as functions of
    Python in C, the name.
    """
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        # An object that can be called, such as a partial, or a function in C.
        path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return name if path is None else sha256_of(path)
