"""Errors for users: each message says what, where and how to fix it.

Violations of our own invariants are assertions, never one of these.
"""

import difflib
from collections.abc import Iterable


class CastaliaError(Exception):
    """Base class of every error that a user can cause or fix.

    The command line prints its text, without a traceback, and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(CastaliaError):
    """A config, an override or a command line is wrong. Lists all problems at once."""

    exit_code = 2


class DataError(CastaliaError):
    """A text file, token file or tokenizer is unreadable, or has changed since the run began."""


class CheckpointError(CastaliaError):
    """A checkpoint is missing, incomplete, corrupt or belongs to another run."""


class TrainingError(CastaliaError):
    """Training cannot continue: a loss or gradient is not finite, or a rank is lost."""


MOST_QUOTED = 100
"""Characters of what a user gave that an error repeats."""


def quoted(text: str, most: int = MOST_QUOTED) -> str:
    """A text of a user's in quotes, for an error: at most its first `most` characters.

    An error that repeats megabytes is no error anyone reads, and costs as much as the request.
    """
    if len(text) <= most:
        return repr(text)
    return f"{text[:most]!r}… ({len(text):,} characters)"


def nearest(name: str, choices: Iterable[str], alike: float = 0.6) -> str:
    """The hint `; did you mean 'x'?` for the choice closest to `name`; empty if none is close.

    `alike` is difflib's ratio from which a choice is close. An overlong name is close to none: the
    comparison takes time with the square of the length.
    """
    if len(name) > MOST_QUOTED:
        return ""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=alike)
    if not matches:
        return ""
    return f"; did you mean {matches[0]!r}?"
