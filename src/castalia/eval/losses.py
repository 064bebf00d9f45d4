"""Summed next-token loss of a model over batches of tokens and labels."""

from collections.abc import Iterable

import torch
from torch import Tensor

from castalia.losses.cross_entropy import fused_cross_entropy
from castalia.models import Decoder

TokensAndLabels = tuple[Tensor, Tensor]
"""Tokens and labels, both (B, T) int64; labels of -100 do not count."""


@torch.no_grad()
def sum_of_losses(model: Decoder, batches: Iterable[TokensAndLabels]) -> float:
    """Negative log-likelihood of all labels under `model`, in nats."""
    device = model.head_weight.device
    model.eval()
    total = 0.0
    for tokens, labels in batches:
        hidden_NC = model(tokens.to(device)).flatten(0, 1)
        labels_N = labels.to(device).flatten()
        # Float addition in Python: float64 over batches, whatever the model's dtype.
        total += float(fused_cross_entropy(hidden_NC, model.head_weight, labels_N).total)
    return total
