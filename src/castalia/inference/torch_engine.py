"""The model itself as an engine: a `Decoder` with its `ModelState`, on any device and dtype of torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.inference.engine import HEAD_ROWS, Engine, Slots
from castalia.models import Decoder

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TorchSlots(Slots):
    """Slots of a `ModelState`. All rows take part in every step; those that were not asked for read a 0 and forget it."""

    def __init__(self, model: Decoder, count: int, length: int) -> None:
        super().__init__(count, length)
        self.model, self.weight = model, model.head_weight
        self.state = model.new_state(count, length + 1)

    @torch.inference_mode()
    def feed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See `Slots`."""
        if all(len(ids) == 1 for ids in tokens):
            return self.step(slots, [ids[0] for ids in tokens])
        if not any(self.lengths[slot] for slot in slots):
            return self.read(slots, tokens)
        return torch.cat([self.go_on(slot, ids) for slot, ids in zip(slots, tokens, strict=True)])

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One token for each of some slots."""
        column = torch.zeros(self.count, 1, dtype=torch.int64)
        column[list(slots), 0] = torch.tensor(tokens)
        hidden = self.model(column.to(self.weight.device), state=self.state)[:, 0]
        for slot in slots:
            self.lengths[slot] += 1
        if len(slots) < self.count:
            self.rewind()
        return self.head(hidden if list(slots) == list(range(self.count)) else hidden[list(slots)])

    def read(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts of any lengths into empty slots, padded on the right."""
        lengths = [len(ids) for ids in prompts]
        rows = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, ids in zip(rows, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        whole = list(slots) == list(range(self.count))
        state = self.state if whole else self.model.new_state(len(prompts), max(lengths))
        hidden = self.model(rows.to(self.weight.device), state=state)
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        if not whole:
            self.state.write_rows(slots, state)
        self.rewind()
        return self.head(hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1])

    def go_on(self, slot: int, ids: Sequence[int]) -> Tensor:
        """More tokens after those that a slot has, one by one."""
        for token in ids:
            logits = self.step([slot], [token])
        return logits

    @torch.inference_mode()
    def feed_all(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See `Slots`; one pass where there is one slot."""
        if self.count > 1:
            return super().feed_all(slot, tokens)
        hidden = self.model(
            torch.tensor([list(tokens)], device=self.weight.device), state=self.state
        )[0]
        self.lengths[slot] += len(tokens)
        return self.head(hidden)

    def rewind(self) -> None:
        """Set the state to our lengths; slots that read a 0 forget it."""
        lengths = torch.tensor(self.lengths, device=self.weight.device)
        self.state.lengths = torch.maximum(self.state.lengths, lengths)
        self.state.rewind(lengths)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32."""
        logits: Tensor = self.model.head(hidden)
        return logits.float()

    def copy(self, origin: int, target: int, tokens: int) -> None:
        """See `Slots`."""
        if origin != target:
            self.state.copy_row(origin, target, tokens)
        self.lengths[target] = tokens
        self.rewind()


class TorchEngine(Engine):
    """A decoder in eval mode."""

    name = "torch"

    def __init__(self, model: Decoder) -> None:
        super().__init__(model.config)
        self.model = model.eval()

    @property
    def device(self) -> torch.device:
        """See `Engine`."""
        return self.model.head_weight.device

    @property
    def numbers(self) -> str:
        """The dtype of the weights."""
        return NAMES[self.model.head_weight.dtype]

    def slots(self, count: int, length: int) -> TorchSlots:
        """See `Engine`."""
        return TorchSlots(self.model, count, length)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`."""
        out: Tensor = self.model.head(self.hidden(ids)).float()
        return out

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """See `Engine`. The logits exist for 256 positions at a time."""
        hidden = self.hidden(ids)[:-1]
        labels = torch.tensor(ids[1:], device=hidden.device)
        parts = []
        for rows, picked in zip(hidden.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
            logprobs = torch.log_softmax(self.model.head(rows), 1, dtype=torch.float32)
            parts.append(logprobs.gather(1, picked[:, None])[:, 0])
        return torch.cat(parts)

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """Hidden states (T, C) of T ids."""
        tokens = torch.tensor([list(ids)], device=self.model.head_weight.device)
        hidden: Tensor = self.model(tokens)[0]
        return hidden
