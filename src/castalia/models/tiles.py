"""Sizes of the pieces in which attention and the loss work, and which blocks recompute; needs no torch, so that an
estimate can count with them."""

from typing import Literal

QUERIES = 128
"""Queries in a block of attention on a CPU: enough for full-speed products, few enough to skip most of the upper
triangle."""
KEEP = 16
"""Attention probabilities are kept when T <= KEEP * head_dim; they are then about as large as the MLP's activations."""
LOGITS_BYTES = {"cpu": 25 << 20}
"""Size of a chunk of logits, when it is more than that of W: on a CPU what its last-level cache holds."""
LOGITS_BYTES_DEVICE = 512 << 20
"""The same on a GPU: rows enough to keep it busy."""


def logits_rows(V: int, C: int, itemsize: int, device: str) -> int:
    """Rows of logits in one chunk, V tokens of `itemsize` bytes wide.

    LOGITS_BYTES of the device, or as many rows as the head's weight is wide, C: then as large as that weight.
    """
    return max(1, C, LOGITS_BYTES.get(device, LOGITS_BYTES_DEVICE) // (V * itemsize))


Kind = Literal["", "full", "selective"]
"""What one block computes again in the backward pass; "" stores everything. See castalia.models.recompute."""


def kind_of(recompute: bool | str | int, layer: int) -> Kind:
    """What block `layer` does when the model is to recompute so: False, True or "full", "selective", or every n-th."""
    if isinstance(recompute, bool) or recompute in ("full", "selective"):
        return recompute if isinstance(recompute, str) else "full" if recompute else ""  # type: ignore[return-value]
    return "full" if layer % int(recompute) == 0 else ""
