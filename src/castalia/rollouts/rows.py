"""Answers as rows of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from castalia.data.batch import Batch
from castalia.data.labels import IGNORED
from castalia.data.step_reader import PADDING_ROW
from castalia.rollouts.answers import Answer, Prompt


class Judged(NamedTuple):
    """An answer with what the loss needs to know of it."""

    answer: Answer
    number: int
    """Among the answers to its prompt."""
    reward: float
    """The weighted sum of `parts`."""
    parts: list[float | None]
    """What each reward function gave, unweighted."""
    sampled: list[float] | None
    """Log-probability of each of its tokens when it was drawn; None for the weights at hand."""
    advantage: float = 0.0


def prompts_of(batch: Batch) -> list[Prompt]:
    """The prompts of a batch, without padding rows."""
    assert batch.filled is not None, "rows of prompts end early"
    prompts = []
    numbers = zip(batch.index.tolist(), batch.filled.tolist(), strict=True)
    for row, (place, length) in enumerate(numbers):
        if place != PADDING_ROW:
            ids = batch.tokens[row, :length].tolist()
            prompts.append(Prompt(ids, place, int(batch.source[row])))
    return prompts


def answer_rows(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Judged]],
    length: int,
    count: int,
    *,
    only_ended: bool = False,
) -> Batch:
    """A batch of the answers of groups, those of a group one after the other.

    Takes   groups: answers of each prompt; length: T of the rows; count: answers
            to a prompt in all, of which these may be a part; only_ended: answers that the limit
            cut off have no labels.
    Shapes  (P, G) answers -> rows (P * G, T). The labels are the tokens of the answers, the one
            that ended each included.
    """
    rows = [(prompt, one) for prompt, group in zip(prompts, groups, strict=True) for one in group]
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    sampled = torch.zeros(len(rows), length)
    filled = []
    for row, (prompt, one) in enumerate(rows):
        ids = [*prompt.ids, *one.answer.ids]
        first = len(prompt.ids) - 1
        tokens[row, : len(ids)] = torch.tensor(ids)
        if one.answer.has_ended or not only_ended:
            labels[row, first : len(ids) - 1] = torch.tensor(one.answer.ids)
        if one.sampled is not None:
            sampled[row, first : len(ids) - 1] = torch.tensor(one.sampled)
        filled.append(len(ids))
    places = torch.tensor([prompt.place for prompt, _ in rows])
    numbers = torch.tensor([one.number for _, one in rows])
    return Batch(
        tokens=tokens,
        labels=labels,
        source=torch.tensor([prompt.source for prompt, _ in rows], dtype=torch.int32),
        # Distinct: two answers to a prompt must not drop the same activations.
        index=places * count + numbers,
        group=places,
        filled=torch.tensor(filled),
        reward=torch.tensor([one.reward for _, one in rows]),
        advantage=torch.tensor([one.advantage for _, one in rows]),
        sampled=None if rows[0][1].sampled is None else sampled,
    )


def padding_rows(length: int, count: int) -> Batch:
    """Rows that do not count, for a rank without a prompt."""
    return Batch(
        tokens=torch.zeros(count, length, dtype=torch.int64),
        labels=torch.full((count, length), IGNORED),
        source=torch.zeros(count, dtype=torch.int32),
        index=torch.full((count,), PADDING_ROW),
        group=torch.full((count,), PADDING_ROW),
        filled=torch.ones(count, dtype=torch.int64),
        reward=torch.zeros(count),
        advantage=torch.zeros(count),
    )
