"""Losses. Each returns sums, never means; the loop divides by the global number of target tokens."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from castalia.data.batch import Batch
from castalia.models import Decoder
from castalia.models.cross_entropy import fused_cross_entropy


@dataclass(frozen=True)
class LossOut:
    """What one micro-batch gives.

    Shapes  total: scalar with a gradient, the sum over the targets, in nats; tokens: scalar int64, the targets;
            per_source (K, 2) float64: sum of the loss and number of targets by source, no gradient.
    """

    total: Tensor
    tokens: Tensor
    per_source: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """The seam through which every kind of training enters the one loop."""

    def __call__(self, model: Decoder, batch: Batch) -> LossOut:
        """Run the model on `batch`."""


class NextToken:
    """Cross-entropy of the next token, over chunks of rows: the whole logits matrix never exists.

    `sources` is the number K of data sources; `compiled` gives the elementwise part of the loss to torch.compile.
    """

    def __init__(self, sources: int = 1, *, compiled: bool = False) -> None:
        self.sources, self.compiled = sources, compiled

    def __call__(self, model: Decoder, batch: Batch) -> LossOut:
        """Forward pass and summed loss of one micro-batch."""
        hidden_BTC = model(batch.tokens, positions=batch.positions, segments=batch.segments)
        labels_N = batch.labels.reshape(-1)
        hidden_NC = hidden_BTC.flatten(0, 1)
        total, losses_N = fused_cross_entropy(
            hidden_NC, model.head_weight, labels_N, compiled=self.compiled, part=model.vocab_part
        )
        return LossOut(total, (labels_N >= 0).sum(), self.by_source(losses_N, batch))

    def by_source(self, losses_N: Tensor, batch: Batch) -> Tensor:
        """Loss sums and target counts of each source."""
        sums_B = losses_N.view(batch.labels.shape).sum(1, dtype=torch.float64)
        counts_B = (batch.labels >= 0).sum(1, dtype=torch.float64)
        per_source = torch.zeros(self.sources, 2, dtype=torch.float64, device=losses_N.device)
        return per_source.index_add_(0, batch.source.long(), torch.stack([sums_B, counts_B], dim=1))
