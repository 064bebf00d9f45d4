"""Credentials do not belong in a config: every run folder and every checkpoint has a copy of it."""

from collections.abc import Iterator
from typing import Any

from castalia.config.base import Config
from castalia.config.values import flatten
from castalia.core.errors import ConfigError
from castalia.core.secrets import is_secret, is_secret_option, redacted, redacted_url

VARIABLES = "launch.environment."
"""Keys below are names of environment variables."""


def require_no_credentials(config: Config) -> None:
    """Check that a config holds no key, token or password, before it is written or sent anywhere.

    Raises  ConfigError with the keys that hold one, without their values.
    """
    keys = [
        key
        for key, value in flatten(config.model_dump(mode="json")).items()
        if any(holds_credential(key, text) for text in texts_of(value))
    ]
    if keys:
        raise ConfigError(
            f"{', '.join(keys)}: a config must not hold keys, tokens or passwords, because"
            " config.yaml, command.txt and every checkpoint keep it; set them in the environment"
            " of the process that needs them, or keep them in a file that you alone can read, as"
            " ~/.netrc and ~/.aws/credentials"
        )


def texts_of(value: Any) -> Iterator[str]:
    """The texts in a value of a flattened config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def holds_credential(key: str, text: str) -> bool:
    """Whether the text of a key is a credential or has one in it."""
    if key.startswith(VARIABLES) and is_secret(key.removeprefix(VARIABLES)):
        return bool(text)
    if is_secret_option(key.rpartition(".")[2]):
        return bool(text)
    # Options of launchers assign variables; a template may say `token=` and mean anything.
    if key.startswith("launch."):
        return redacted(text) != text
    return any(redacted_url(word) != word for word in text.split() if "://" in word)
