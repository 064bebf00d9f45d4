"""Memorization: which rows of the training data a model completes by itself."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.inference.language_model import LanguageModel
from castalia.memorization.completion import Wanted, in_parallel
from castalia.memorization.engines import readers_of

Ids = NDArray[np.int64]
Rows = Sequence[Sequence[int] | Ids] | Ids


class Recall(NamedTuple):
    """What greedy decoding made of one row."""

    made: Ids
    """(N,) the tokens after the prompt as the model writes them."""
    true: Ids
    """(N,) the row's own."""
    score: float
    """Share of the N tokens that are equal; 1 means memorized."""


def memorized(
    model: LanguageModel, rows: Rows, prompt: int = 32, continuation: int = 32, batch: int = 16
) -> NDArray[np.float32]:
    """The memorization score of each row: 1 where the model is k-extractable with k = `prompt`.

    The first `prompt` tokens of a row are continued greedily, whatever token comes, and compared
    place by place with those that follow in the row.

    rows          (R,) rows of at least prompt + continuation tokens.
    prompt        tokens that the model is given.
    continuation  tokens that it makes.
    batch         rows that are continued together.

    Shapes  -> (R,) float32 in [0, 1].
    Raises  ConfigError if a length is not positive, the rows are shorter than both lengths
            together, or the model reads fewer tokens.
    Source  Biderman et al. 2023, arXiv:2304.11158, section 3; both lengths are 32 there.
    """
    recalls = recall(model, rows, prompt, continuation, batch)
    return np.array([each.score for each in recalls], np.float32)


def memorization_score(made: ArrayLike, true: ArrayLike) -> NDArray[np.float32]:
    """Share of the N continuation tokens that greedy decoding reproduced.

    Shapes  made, true (..., N) integers -> (...) float32 in [0, 1].
    Raises  ValueError if the shapes differ.
    Source  Biderman et al. 2023, arXiv:2304.11158, equation 1.
    """
    made_ids = np.asarray(made)
    true_ids = np.asarray(true)
    # Without this check numpy would repeat the shorter one.
    if made_ids.shape != true_ids.shape:
        raise ValueError(f"made has shape {made_ids.shape}, true {true_ids.shape}")
    return np.asarray((made_ids == true_ids).mean(axis=-1), np.float32)


def recall(
    model: LanguageModel, rows: Rows, prompt: int = 32, continuation: int = 32, batch: int = 16
) -> Iterator[Recall]:
    """As `memorized`, with the tokens, a row at a time: whoever stops asking ends the work.

    Raises  ConfigError as `memorized`, before the first row.
    """
    require_lengths(model, rows, prompt, continuation, batch)
    return recalled(model, rows, prompt, continuation, batch)


def recalled(
    model: LanguageModel, rows: Rows, prompt: int, continuation: int, batch: int
) -> Iterator[Recall]:
    """The rows, `batch` at a time."""
    length = prompt + continuation
    waiting = iter(rows)
    readers = readers_of(model).readers
    while part := list(islice(waiting, batch)):
        ids = np.array([row[:length] for row in part], np.int64)
        # Ids beyond the vocabulary would be read from behind the embedding.
        model.require_ids(ids.reshape(-1).tolist())
        # A token that ends a document is compared like any other.
        made = in_parallel(readers, ids, Wanted(prompt, loss=False)).made
        scores = memorization_score(made, ids[:, prompt:])
        for own, true, score in zip(made, ids[:, prompt:], scores, strict=True):
            yield Recall(own, true, float(score))


def require_lengths(
    model: LanguageModel, rows: Rows, prompt: int, continuation: int, batch: int
) -> None:
    """Raises  ConfigError as `memorized`."""
    for name, value in (("prompt", prompt), ("continuation", continuation), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    length = prompt + continuation
    shortest = min((len(row) for row in rows), default=length)
    limit = model.config.max_position_embeddings
    what = f"a prompt of {prompt} and a continuation of {continuation} tokens need {length}"
    if shortest < length:
        raise ConfigError(f"{what}, but a row has {shortest}; choose shorter lengths")
    if limit < length:
        raise ConfigError(f"{what}, but the model reads {limit}; choose shorter lengths")
