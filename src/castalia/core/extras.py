"""Optional dependencies: a missing one is a single sentence with the pip command."""

import importlib
from types import ModuleType

from castalia.core.errors import ConfigError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, a dependency of the optional extra `extra`.

    Raises  ConfigError with the purpose and the pip command, if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # An installed package may itself miss a dependency. That is its own error, not this one.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ConfigError(
            f"{purpose} needs {module!r}, which is not installed: pip install 'castalia[{extra}]'"
        ) from None
