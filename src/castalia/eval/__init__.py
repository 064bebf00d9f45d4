"""Quality of checkpoints: bits per byte of held-out text and losses by source.

Public names are imported when they are asked for: the section `eval` of a config needs no torch.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.eval.bits import HeldOut, SourceBits, bits_per_byte
    from castalia.eval.reference import reference_losses, write_reference

__all__ = ["HeldOut", "SourceBits", "bits_per_byte", "reference_losses", "write_reference"]
PLACES = {
    "HeldOut": "bits",
    "SourceBits": "bits",
    "bits_per_byte": "bits",
    "reference_losses": "reference",
    "write_reference": "reference",
}
__getattr__ = lazy(__name__, PLACES)
