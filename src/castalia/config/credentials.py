"""Credentials do not belong in a config: every run folder and every checkpoint has a copy of it."""

from collections.abc import Iterator, Mapping
from typing import Any

from castalia.config.base import Config
from castalia.core.errors import ConfigError
from castalia.core.secrets import is_secret, is_secret_option, redacted, redacted_url

VARIABLES = "launch.environment."
"""Keys below are names of environment variables."""


def require_no_credentials(config: Config) -> None:
    """Check that a config holds no key, token or password, before it is written or sent anywhere.

    Raises  ConfigError with the keys that hold one, without their values.
    """
    texts = texts_of(config.model_dump(mode="json"))
    keys = list(dict.fromkeys(key for key, text in texts if holds_credential(key, text)))
    if keys:
        raise ConfigError(
            f"{', '.join(keys)}: a config must not hold keys, tokens or passwords, because"
            " config.yaml, command.txt and every checkpoint keep it; set them in the environment"
            " of the process that needs them, or keep them in a file that you alone can read, as"
            " ~/.netrc and ~/.aws/credentials"
        )


def texts_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted key and the text of every text in a value of a config."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        # Of a list of sections, such as monitor.sinks, each item has keys of its own.
        for item in value:
            yield from texts_of(item, key)


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
