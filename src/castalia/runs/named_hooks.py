"""Hooks named in the config: `hooks: [module:Class]`."""

import importlib
from collections.abc import Sequence

from castalia.core.errors import ConfigError
from castalia.runs.hook import Hook


def hook_class(name: str) -> type[Hook]:
    """The class that `module:Class` names.

    Raises  ConfigError saying which part could not be imported.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"hook {name!r}: expected module:Class, for instance mylab.hooks:Probe")
    # ImportError alone: any other error in the module is a bug, and its traceback shows where.
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"hook {name!r}: cannot import the module {module!r}: {error}") from None
    chosen = getattr(imported, attribute, None)
    if chosen is None:
        raise ConfigError(f"hook {name!r}: the module {module!r} has no class {attribute!r}")
    if not (isinstance(chosen, type) and issubclass(chosen, Hook)):
        raise ConfigError(
            f"hook {name!r}: {attribute} is not a subclass of castalia.train.hooks.Hook"
        )
    return chosen


def named_hooks(names: Sequence[str]) -> list[Hook]:
    """One new hook of each class, made without arguments.

    Raises  ConfigError if a class cannot be imported, or needs arguments.
    """
    hooks = []
    for name in names:
        # New ones at each run: hooks keep state.
        kind = hook_class(name)
        try:
            hooks.append(kind())
        except TypeError as error:
            raise ConfigError(f"hook {name!r}: must be made without arguments: {error}") from None
    return hooks
