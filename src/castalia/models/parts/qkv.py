"""Row orders of a fused QKV weight: GPT-NeoX interleaves q, k and v by head; others keep them apart."""

from torch import Tensor


def heads_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, c, d) of GPT-NeoX's QKV to rows (c, head, d): all queries, then all keys, then all values."""
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def heads_together(weight: Tensor, heads: int) -> Tensor:
    """The way back of `heads_apart`."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
