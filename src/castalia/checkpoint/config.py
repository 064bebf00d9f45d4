"""When to save and what to keep."""

from pydantic import NonNegativeInt, PositiveInt

from castalia.config.base import Config

PYTHIA_EARLY = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
"""The early part of Pythia's 154 checkpoints."""


class CheckpointConfig(Config):
    """Steps to save: the list, every k, and always the last."""

    steps: list[NonNegativeInt] = []
    """Steps to save, for instance 0, 1, 2, 4, ..., 512."""
    every: PositiveInt | None = 1000
    """Steps from one save to the next; null saves only at `steps` and at the end."""
    keep: PositiveInt | None = None
    """Newest checkpoints that are kept, besides those in `steps`; null keeps all."""
    asynchronous: bool = True
    """Write in the background; training waits only for the copy of the weights."""
