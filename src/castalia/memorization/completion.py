"""What greedy decoding makes of windows of rows: scores, exactness and losses, for any reader.

One teacher-forced pass tells how far greedy decoding agrees with the row: up to the first place
whose largest logit is another token, decoding reads the very tokens of the row. Equal at all places
is therefore what decoding would find, and it goes on by itself from the first mismatch alone.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
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

    def at(self, places: Ids) -> "Completions":
        """Those of some windows, which may repeat."""
        losses = None
        if self.losses is not None:
            losses = self.losses[places]
        return Completions(self.made[places], self.exact[places], losses, self.near[places])


def nothing(wanted: Wanted, continuation: int) -> Completions:
    """The completions of no window."""
    no = np.empty(0, np.bool_)
    losses = None
    if wanted.loss:
        losses = np.empty(0, np.float32)
    return Completions(np.empty((0, continuation), np.int64), no, losses, no)


def in_parallel(readers: Sequence[Reader], windows: Ids, wanted: Wanted) -> Completions:
    """The completions of R >= 1 windows (R, prompt + N), each reader on a thread of its own."""
    # No more at once than leaves work for every reader.
    size = max(1, min(readers[0].rows_at_once, -(-len(windows) // len(readers))))
    free: SimpleQueue[Reader] = SimpleQueue()
    for reader in readers:
        free.put(reader)

    def part(start: int) -> Completions:
        reader = free.get()
        try:
            return complete(reader, windows[start : start + size], wanted)
        finally:
            free.put(reader)

    starts = range(0, len(windows), size)
    if len(readers) == 1:
        parts = [part(start) for start in starts]
    else:
        with ThreadPoolExecutor(len(readers)) as pool:
            parts = list(pool.map(part, starts))
    losses = [each.losses for each in parts if each.losses is not None]
    return Completions(
        np.concatenate([each.made for each in parts]),
        np.concatenate([each.exact for each in parts]),
        np.concatenate(losses) if losses else None,
        np.concatenate([each.near for each in parts]),
    )


def complete(reader: Reader, windows: Ids, wanted: Wanted) -> Completions:
    """The completions of windows (R, prompt + N), all together."""
    if wanted.loss:
        return by_force(reader, windows, wanted)
    # Nobody asks for the choices behind the first mismatch, so the row's own tokens are not read
    # there: decoding alone reads fewer.
    made = np.full((len(windows), windows.shape[1] - wanted.prompt), -1, np.int64)
    every = np.arange(len(windows))
    reader.open(len(windows), windows.shape[1] - 1)
    choices = reader.read(
        every, np.zeros_like(every), windows[:, : wanted.prompt], wanted.prompt - 1
    )
    made[:, 0] = choices.best[:, 0]
    near = choices.near[:, 0].copy()
    if wanted.score:
        go_on(reader, wanted.prompt, made, near, np.ones_like(every))
    else:
        check_rest(reader, windows, wanted, made, near)
    return completions(windows, wanted, made, near, None)


def check_rest(
    reader: Reader, windows: Ids, wanted: Wanted, made: Ids, near: NDArray[np.bool_]
) -> None:
    """Read on in the rows whose first choice is the row's own, by force."""
    true = windows[:, wanted.prompt :]
    rows = np.flatnonzero(made[:, 0] == true[:, 0])
    if len(rows) == 0 or made.shape[1] == 1:
        return
    if reader.rewinds:
        starts = np.full(len(rows), wanted.prompt)
        choices = reader.read(rows, starts, windows[rows, wanted.prompt : -1], 0)
    else:
        reader.open(len(rows), windows.shape[1] - 1)
        every = np.arange(len(rows))
        choices = reader.read(every, np.zeros_like(every), windows[rows, :-1], wanted.prompt)
    known = np.arange(1, made.shape[1]) <= first_mismatch(choices.best, true[rows, 1:])[:, None] + 1
    made[rows, 1:] = np.where(known, choices.best, -1)
    near[rows] |= (choices.near & known).any(axis=1)


def by_force(reader: Reader, windows: Ids, wanted: Wanted) -> Completions:
    """As `complete`, by a teacher-forced pass first."""
    reader.open(len(windows), windows.shape[1] - 1)
    every = np.arange(len(windows))
    true = windows[:, wanted.prompt :]
    labels = None
    if wanted.loss:
        labels = true
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
