"""Row orders of a fused QKV weight: head by head, as GPT-NeoX stores it, or q, k and v apart."""

from torch import Tensor


def heads_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, c, d) to rows (c, head, d): all queries, then all keys, then all values."""
    apart: Tensor = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1)
    return apart.flatten(0, 2)


def heads_together(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `heads_apart`."""
    together: Tensor = weight.unflatten(0, (3, heads, -1)).transpose(0, 1)
    return together.flatten(0, 2)
