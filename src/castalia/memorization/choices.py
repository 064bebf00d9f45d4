"""Greedy choices and losses out of logits of torch."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castalia.inference.engine import label_logprobs
from castalia.memorization.reader import NEAR, Choices, Ids


def choices_of(
    parts: Iterable[Tensor], shape: tuple[int, int], vocab_size: int, labels: Ids | None
) -> Choices:
    """The choices of S sequences at W places each.

    Shapes  parts of logits (rows, V) float32, together S * W rows, sequence by sequence; they are
            written into. shape (S, W); labels (S, W).
    """
    best = []
    near = []
    losses = []
    wanted = None
    if labels is not None:
        wanted = torch.from_numpy(labels.reshape(-1))
    at = 0
    for logits in parts:
        if wanted is not None:
            own = wanted[at : at + len(logits)].to(logits.device)
            losses.append(-label_logprobs(logits, own).cpu().numpy())
        at += len(logits)
        # The padding of the vocabulary is never chosen.
        largest, places = two_largest(logits[:, :vocab_size])
        best.append(places)
        near.append(largest[:, 0] - largest[:, 1] < NEAR)
    return Choices(
        np.concatenate(best).reshape(shape),
        np.concatenate(near).reshape(shape),
        np.concatenate(losses).reshape(shape) if losses else None,
    )


def two_largest(logits: Tensor) -> tuple[NDArray[np.float32], Ids]:
    """The two largest of each row, and the place of the largest, the first among equals.

    Shapes  logits (n, V) -> (n, 2) float32, (n,) int64. Writes into the logits.
    """
    if logits.is_cpu:
        # numpy's argmax is eight times as fast as torch's; both take the first of equals.
        places = torch.from_numpy(logits.numpy().argmax(-1))
    else:
        places = logits.argmax(-1)
    rows = torch.arange(len(logits), device=logits.device)
    largest = logits[rows, places]
    logits[rows, places] = -torch.inf
    second = logits.amax(-1)
    return torch.stack([largest, second], 1).cpu().numpy(), places.cpu().numpy()
