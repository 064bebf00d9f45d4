"""A reader over the PyTorch decoder: every family, device and dtype of torch."""

import numpy as np
import torch

from castalia.inference.engine import HEAD_ROWS
from castalia.memorization.choices import choices_of
from castalia.memorization.reader import Choices, Ids, Reader
from castalia.models import Decoder, ModelState


class TorchReader(Reader):
    """The rows of one state; a call that reads some of them lets the others read zeros.

    A batch of fixed size costs less than copying the state of the rows in use.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.rewinds = model.family.can_rewind(model.config)
        self.rows_at_once = 1024
        if model.head_weight.is_cpu:
            self.rows_at_once = 128
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
        S = len(slots)
        W = tokens.shape[1] - first
        rows = hidden[:, first:].reshape(S * W, -1)
        parts = (self.model.head(part).float() for part in rows.split(HEAD_ROWS))
        return choices_of(parts, (S, W), self.model.config.vocab_size, labels)
