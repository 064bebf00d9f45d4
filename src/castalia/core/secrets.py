"""Credentials by their names: keys, tokens and passwords leave neither this host nor stay in a
file."""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

HIDDEN = "***"
"""What is recorded in place of a credential."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(^|_)(AUTH|PAT)(_|$)")
"""Part of the name of an environment variable that holds a credential."""
HARMLESS = re.compile(r"PKEY|TOKENI[SZ]|TOKENS")
"""Parts that look alike: partitions of InfiniBand, tokenizers, numbers of tokens."""
SECRET_OPTION = re.compile(
    r"(^|_)((api|access|secret|private|auth|session|account|hub|hf|bearer)_?(key|token)(_id)?"
    r"|passw(or)?d|passphrase|secret|credentials?)$"
)
"""The name of an option or a config key. Alone, `key` and `token` mean other things there."""
SECRET_PARAMETER = re.compile(
    r"token|key|secret|passw|credential|(^|-)sig(nature)?$", re.IGNORECASE
)
"""The name of a parameter of a URL: of a signed one, or of one with a key."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"]+")
ASSIGNMENT = re.compile(r"\b(?P<name>[A-Za-z_]\w*)=(?P<value>[^\s,;'\"]+)")


def is_secret(name: str) -> bool:
    """Whether an environment variable holds a credential, by its name."""
    return SECRET.search(HARMLESS.sub("", name.upper())) is not None


def is_secret_option(name: str) -> bool:
    """Whether an option `--api-key` or a config key `hub_token` holds a credential."""
    return SECRET_OPTION.search(name.lstrip("-").replace("-", "_").lower()) is not None


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that may leave this host."""
    passed = {}
    for name, value in variables.items():
        if not is_secret(name) and redacted(value) == value:
            passed[name] = value
    return passed


def redacted(text: str) -> str:
    """A text without the passwords and keys of its URLs and assignments: `https://u:***@host`."""
    text = URL.sub(lambda found: redacted_url(found[0]), text)
    return ASSIGNMENT.sub(redacted_assignment, text)


def redacted_assignment(found: re.Match[str]) -> str:
    """`NAME=***` if the variable or the config key holds a credential."""
    if (is_secret(found["name"]) and found["name"].isupper()) or is_secret_option(found["name"]):
        return f"{found['name']}={HIDDEN}"
    return found[0]


def redacted_url(url: str) -> str:
    """A URL without its password, and without the values of secret parameters."""
    try:
        parts = urlsplit(url)
        user = parts.username
        password = parts.password
    except ValueError:  # no URL after all
        return url
    if password or (user and parts.scheme in ("http", "https")):
        # Alone before the host of a web server stands a token; elsewhere a user or a container.
        shown = f"{user}:{HIDDEN}" if password else HIDDEN
        host = parts.netloc.rpartition("@")[2]
        url = url.replace(parts.netloc, f"{shown}@{host}", 1)
    for parameter in parts.query.split("&"):
        name, _, value = parameter.partition("=")
        if value and SECRET_PARAMETER.search(name):
            url = url.replace(parameter, f"{name}={HIDDEN}")
    return url


def redacted_words(words: Sequence[str]) -> list[str]:
    """A command line without credentials: `--api-key ***`, `hub_token=***`, and those of URLs."""
    shown = []
    hides_next = False
    for word in words:
        if hides_next:
            word = HIDDEN
        hides_next = False
        name, equals, _ = word.partition("=")
        if word.startswith("--") and is_secret_option(name):
            hides_next = not equals
            word = f"{name}={HIDDEN}" if equals else name
        shown.append(redacted(word))
    return shown
