"""`Published`: the shape of a published model, and how it was trained."""

from typing import Any, NamedTuple

M = 1 << 20
"""Tokens of a batch of 1M."""


class Published(NamedTuple):
    """One model."""

    family: str
    layers: int
    width: int
    heads: int
    """Of attention; 0 for a family without."""
    vocabulary: int
    lr: float
    tokens: float
    """Tokens of the whole training."""
    batch_tokens: int
    """Tokens of one step."""
    seq_length: int
    options: dict[str, Any] = {}
    """Of the section `model`, beside the family's defaults."""
    weight_decay: float = 0.1
    min_lr_share: float = 0.1
    """The last learning rate as a share of the peak."""
    warmup_steps: int = 2000
