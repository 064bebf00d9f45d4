"""Errors for users. Each message says what, where and how to fix it; `assert` is for our own invariants."""

import difflib
from collections.abc import Iterable


class CastaliaError(Exception):
    """Base of every error that a user can cause or mend; the command prints its text and exits with `exit_code`."""

    exit_code = 1


class ConfigError(CastaliaError):
    """A config, an override or a command line is wrong. Lists every problem at once."""

    exit_code = 2


class DataError(CastaliaError):
    """A text file, a token file or a tokenizer cannot be read, or changed since the run began."""


class CheckpointError(CastaliaError):
    """A checkpoint is missing, incomplete, corrupt or of another run."""


class TrainingError(CastaliaError):
    """Training cannot go on: a loss or gradient that is not finite, or a rank that is lost."""


def nearest(name: str, have: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the option closest to `name`, else an empty string."""
    found = difflib.get_close_matches(name, list(have), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
