"""Quality of checkpoints: bits per byte of held-out text and losses by source."""

from castalia.eval.bits import HeldOut, SourceBits, bits_per_byte
from castalia.eval.reference import reference_losses, write_reference
from castalia.eval.sweep import sweep

__all__ = ["HeldOut", "SourceBits", "bits_per_byte", "reference_losses", "sweep", "write_reference"]
