"""What greedy decoding makes of windows of rows: scores, exactness and losses, for any reader.

One teacher-forced pass tells how far greedy decoding agrees with the row: up to the first place
whose largest logit is another token, decoding reads the very tokens of the row. Equal at all places
is therefore what decoding would find, and it goes on by itself from the first mismatch alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from castalia.memorization.reader import Ids, Losses, Reader


class Wanted(NamedTuple):
    """What is computed of each window."""

    prompt: int
    """Tokens that the model is given."""
    score: bool = True
    """Whether decoding goes on after the first mismatch; without it only exactness is known."""
    loss: bool = True
    """Whether the loss of the row's own continuation is computed."""


class Completions(NamedTuple):
    """What a model makes of R windows with a continuation of N tokens."""

    made: Ids
    """(R, N) the tokens of greedy decoding; without scores -1 after the first mismatch."""
    exact: NDArray[np.bool_]
    """(R,) whether all N are the row's own."""
    losses: Losses | None
    """(R,) mean loss of the row's own N tokens, in nats."""
    near: NDArray[np.bool_]
    """(R,) whether a choice behind `made` was a near tie."""


def complete(reader: Reader, windows: Ids, wanted: Wanted) -> Completions:
    """The completions of windows (R, prompt + N), all together."""
    if wanted.loss or not wanted.score:
        return by_force(reader, windows, wanted)
    made = np.full((len(windows), windows.shape[1] - wanted.prompt), -1, np.int64)
    near = np.zeros(len(windows), bool)
    every = np.arange(len(windows))
    reader.open(len(windows), windows.shape[1] - 1)
    heads = reader.read(every, np.zeros_like(every), windows[:, : wanted.prompt], wanted.prompt - 1)
    made[:, 0] = heads.best[:, 0]
    near |= heads.near[:, 0]
    go_on(reader, wanted.prompt, made, near, np.ones(len(windows), np.int64))
    return completions(windows, wanted, made, near, None)


def by_force(reader: Reader, windows: Ids, wanted: Wanted) -> Completions:
    """As `complete`, by a teacher-forced pass first."""
    reader.open(len(windows), windows.shape[1] - 1)
    every = np.arange(len(windows))
    true = windows[:, wanted.prompt :]
    labels = true if wanted.loss else None
    choices = reader.read(every, np.zeros_like(every), windows[:, :-1], wanted.prompt - 1, labels)
    first = first_mismatch(choices.best, true)
    # A token after the mismatch was chosen behind a token that decoding never writes.
    known = np.arange(true.shape[1]) <= first[:, None]
    made = np.where(known, choices.best, -1)
    near = np.asarray((choices.near & known).any(axis=1))
    if wanted.score:
        go_on_from(reader, windows, wanted, made, near, first + 1)
    losses = None
    if choices.losses is not None:
        losses = choices.losses.mean(1, dtype=np.float64).astype(np.float32)
    return completions(windows, wanted, made, near, losses)


def go_on_from(
    reader: Reader, windows: Ids, wanted: Wanted, made: Ids, near: NDArray[np.bool_], known: Ids
) -> None:
    """Decode on behind the first known[i] tokens of made[i], where that is not all."""
    N = made.shape[1]
    if reader.rewinds:
        go_on(reader, wanted.prompt, made, near, known)
        return
    # Rows that start at the same place read their beginnings again, together.
    for start in np.unique(known[known < N]):
        rows = np.flatnonzero(known == start)
        length = wanted.prompt + int(start)
        begun = np.concatenate((windows[rows, : wanted.prompt], made[rows, :start]), 1)
        every = np.arange(len(rows))
        reader.open(len(rows), windows.shape[1] - 1)
        choices = reader.read(every, np.zeros_like(every), begun, length - 1)
        own = made[rows]
        own_near = near[rows] | choices.near[:, 0]
        own[:, start] = choices.best[:, 0]
        go_on(reader, wanted.prompt, own, own_near, np.full(len(rows), start + 1))
        made[rows] = own
        near[rows] = own_near


def go_on(reader: Reader, prompt: int, made: Ids, near: NDArray[np.bool_], known: Ids) -> None:
    """Fill made[i] behind its first known[i] tokens, one token of all unfinished rows at a time.

    All tokens before the last known one have been read.
    """
    known = known.copy()
    N = made.shape[1]
    while len(rows := np.flatnonzero(known < N)):
        at = known[rows]
        choices = reader.read(rows, prompt + at - 1, made[rows, at - 1][:, None], 0)
        made[rows, at] = choices.best[:, 0]
        near[rows] |= choices.near[:, 0]
        known[rows] += 1


def first_mismatch(made: Ids, true: Ids) -> Ids:
    """(R,) the first of N places where they differ; N where they do not."""
    differ = made != true
    return np.where(differ.any(1), differ.argmax(1), true.shape[1])


def completions(
    windows: Ids, wanted: Wanted, made: Ids, near: NDArray[np.bool_], losses: Losses | None
) -> Completions:
    """The completions by their tokens."""
    return Completions(made, (made == windows[:, wanted.prompt :]).all(1), losses, near)
