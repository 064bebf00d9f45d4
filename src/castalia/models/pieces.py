"""Sizes of the pieces in which attention and the loss work; needs no torch, so that an estimate can count with them."""

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
