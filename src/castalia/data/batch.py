"""`Batch`: the rows that go from the data to the loss."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from castalia.data.labels import IGNORED

BY_TOKEN = (
    "tokens",
    "labels",
    "positions",
    "segments",
    "weights",
    "reference",
    "sampled",
    "reference_hidden",
)
"""Fields with a value for each token; the others have one for each row."""


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch.

    Shapes  tokens, labels (B, T) int64, labels IGNORED where a token is not a target;
            source (B,) int32, the place of the row's source in data.train;
            index (B,) int64, the place of the row in the served order;
            positions, segments (B, T) int64, None for 0..T-1 and one document a row;
            weights (B, T) float32, how much each target counts, None for 1;
            group (B,) int64, equal for rows that belong together, such as the two of a pair;
            reference (B, T) float32, log-probabilities under a reference model, in nats;
            reward (B,) float32, the score of a row;
            baseline (B,) float32, the log-ratio of model and reference that counts as none, nats;
            filled (B,) int64, tokens of a row before its padding, the last target included; None
            where rows are full;
            sampled (B, T) float32, log-probabilities under the weights that drew the tokens, in
            nats, None for the weights at hand;
            advantage (B,) float32, how much better the row is than others to the same prompt;
            reference_hidden (B, T, C), hidden states of a reference model.

    The rows of a pair stand next to each other, the preferred one first, in one micro-batch. Both
    have the same `index`.
    """

    tokens: Tensor
    labels: Tensor
    source: Tensor
    index: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None
    weights: Tensor | None = None
    # A reference model comes as data, so that the loop never runs two models.
    group: Tensor | None = None
    reference: Tensor | None = None
    reward: Tensor | None = None
    baseline: Tensor | None = None
    filled: Tensor | None = None
    sampled: Tensor | None = None
    advantage: Tensor | None = None
    reference_hidden: Tensor | None = None

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        return f"Batch({rows} rows of {length} tokens, on {self.tokens.device})"

    @property
    def targets(self) -> int:
        """Number of labels that are targets."""
        return int((self.labels != IGNORED).sum())

    def trimmed(self, multiple: int = 8) -> "Batch":
        """The same rows without the padding that all of them end with.

        Their length is a multiple of `multiple`, so that few lengths occur, or that of full rows. A
        token sees none after it, so nothing else changes but the last digits.
        """
        if self.filled is None:
            return self
        longest = max(int(self.filled.max()), 1)
        length = -(-longest // multiple) * multiple
        if length >= self.tokens.shape[1]:
            return self
        return self.of_tokens(lambda tensor: tensor[:, :length])

    def of_tokens(self, choose: Callable[[Tensor], Tensor]) -> "Batch":
        """The same rows with some of their tokens: `choose` maps (B, T) to (B, fewer)."""
        return self.changed(BY_TOKEN, choose)

    def behind(self, count: int) -> "Batch":
        """The same rows behind `count` places without a token or a target; their ends make room."""
        length = self.tokens.shape[1]
        assert self.positions is None and self.segments is None

        def moved(values: Tensor, filler: float) -> Tensor:
            front = values.new_full((len(values), count), filler)
            return torch.cat([front, values], 1)[:, :length]

        by_token = {
            name: moved(getattr(self, name), IGNORED if name == "labels" else 0)
            for name in BY_TOKEN
            if getattr(self, name) is not None
        }
        filled = None if self.filled is None else (self.filled + count).clamp(max=length)
        return replace(self, filled=filled, **by_token)

    def shortened(self, length: int) -> "Batch":
        """The same rows without the tokens after the first `length` of each."""
        if self.tokens.shape[1] <= length:
            return self
        return self.of_tokens(lambda values: values[:, :length].contiguous())

    def every(self, first: int, step: int) -> "Batch":
        """Each `step`-th row from row `first` on."""
        names = tuple(field.name for field in fields(self))
        return self.changed(names, lambda values: values[first::step])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        names = tuple(field.name for field in fields(self))
        return self.changed(names, lambda tensor: tensor.to(device, non_blocking=True))

    def changed(self, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> "Batch":
        """A copy with `change` applied to those of the named fields that are set."""
        present = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{name: change(tensor) for name, tensor in present.items() if tensor is not None},
        )
