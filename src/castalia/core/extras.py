"""Optional dependencies: one sentence with the pip line when one is missing."""

import importlib
from types import ModuleType

from castalia.core.errors import ConfigError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, which belongs to the optional extra `extra`.

    Raises  ConfigError naming the purpose and the pip line, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ConfigError(
            f"{purpose} needs {module!r}, which is not installed: pip install 'castalia[{extra}]'"
        ) from None
