"""How good a checkpoint is: bits per byte of held-out text, by source."""

from castalia.eval.bits import HeldOut, SourceBits, bits_per_byte
from castalia.eval.sweep import sweep

__all__ = ["HeldOut", "SourceBits", "bits_per_byte", "sweep"]
