"""Strings of Python that are not text: half of a surrogate pair has no UTF-8."""

from typing import Any

from castalia.core.errors import CastaliaError, ConfigError


def require_unicode(text: str, what: str, kind: type[CastaliaError] = ConfigError) -> None:
    """Raises  `kind` naming the first character that no UTF-8 file can hold.

    JSON lets one half of a pair stand alone (`"\\ud800"`), and Python reads a byte of the command
    line or of standard input that is not UTF-8 as the half U+DC80 + byte - 0x80.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise kind(
            f"{what} is not valid Unicode: character {error.start} is U+{code:04X},"
            " half of a surrogate pair or a byte that is not UTF-8; give UTF-8 text"
        ) from None


def require_unicode_in(value: Any, what: str) -> None:
    """Check every string of a JSON value, keys included.

    Raises  ConfigError naming the string by its path, such as `messages.0.content`.
    """
    # A stack of its own: JSON nests deeper than Python's functions may.
    waiting = [(value, what)]
    while waiting:
        each, path = waiting.pop()
        if isinstance(each, str):
            require_unicode(each, path)
        elif isinstance(each, dict):
            for key, inner in each.items():
                require_unicode(str(key), f"a key of {path}")
                waiting.append((inner, str(key) if path == what else f"{path}.{key}"))
        elif isinstance(each, list):
            # A prompt may be a million token ids, of which none needs a path.
            for i, inner in enumerate(each):
                if isinstance(inner, str | dict | list):
                    waiting.append((inner, f"{path}.{i}"))
