"""A reader over the PyTorch decoder: every family, device and dtype of torch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from castalia.inference.engine import HEAD_ROWS, label_logprobs
from castalia.memorization.reader import NEAR, Choices, Ids, Reader
from castalia.models import Decoder, ModelState

Head = Callable[[Tensor], Tensor]


class TorchReader(Reader):
    """The rows of one state; a call that reads some of them lets the others read zeros.

    A batch of fixed size costs less than copying the state of the rows in use.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.rewinds = model.family.rewinds
        self.state: ModelState | None = None

    def open(self, count: int, length: int) -> None:
        """See `Reader`."""
        weight = self.model.head_weight
        # One position more: a full row that idles has to put its zero somewhere.
        self.state = self.model.new_state(count, length + 1, weight.dtype, weight.device)

    @torch.inference_mode()
    def read(
        self, slots: Ids, starts: Ids, tokens: Ids, first: int, labels: Ids | None = None
    ) -> Choices:
        """See `Reader`."""
        state = self.state
        assert state is not None
        device = state.lengths.device
        before = state.lengths.cpu().numpy()
        lengths = before.copy()
        lengths[slots] = starts
        if self.rewinds and (lengths != before).any():
            # A tensor of its own: the state counts its lengths up in place.
            state.rewind(torch.tensor(lengths, device=device))
        batch = np.zeros((len(lengths), tokens.shape[1]), np.int64)
        batch[slots] = tokens
        hidden = self.model(torch.from_numpy(batch).to(device), state=state)
        if len(slots) < len(lengths):
            assert self.rewinds, "a state that cannot be cut back reads all rows together"
            lengths[slots] += tokens.shape[1]
            state.rewind(torch.tensor(lengths, device=device))
            hidden = hidden[torch.from_numpy(slots).to(device)]
        return self.choices(hidden[:, first:], labels)

    def choices(self, hidden: Tensor, labels: Ids | None) -> Choices:
        """The head over hidden states (S, W, C), some places at a time."""
        S, W, C = hidden.shape
        rows = hidden.reshape(S * W, C)
        wanted = None if labels is None else torch.from_numpy(labels.reshape(-1)).to(rows.device)
        best = []
        near = []
        losses = []
        for start in range(0, S * W, HEAD_ROWS):
            logits = self.model.head(rows[start : start + HEAD_ROWS]).float()
            if wanted is not None:
                part = label_logprobs(logits, wanted[start : start + HEAD_ROWS])
                losses.append(-part.cpu().numpy())
            # The padding of the vocabulary is never chosen.
            largest, places = two_largest(logits[:, : self.model.config.vocab_size])
            best.append(places)
            near.append(largest[:, 0] - largest[:, 1] < NEAR)
        return Choices(
            np.concatenate(best).reshape(S, W),
            np.concatenate(near).reshape(S, W),
            np.concatenate(losses).reshape(S, W) if losses else None,
        )


def two_largest(logits: Tensor) -> tuple[np.ndarray, Ids]:
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
