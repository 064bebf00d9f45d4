"""Sizes of the blocks in which attention and the loss work, and which layers recompute.

Needs no torch, so that cost estimates can use the same numbers as the kernels.
"""

from typing import Literal, cast

QUERIES = 128
"""Queries in a block of attention on a CPU: enough for products at full speed, few enough to skip
most of the upper triangle."""
KEEP = 16
"""Attention probabilities of short rows, T <= KEEP * head_dim, are kept for the backward. They are
then about as large as the MLP's activations, and keeping them saves a third of the attention's
products."""
KEEP_NUMBERS = 20 << 20
"""Those of longer rows are kept if a layer has at most so many of them for a micro-batch, 40 MiB in
bf16: rows of 2,048 tokens and 8 heads. There attention with its backward takes 0.78 of the time
without. A limit in numbers bounds what a small model spends; large ones reach it with few rows."""
LOGITS_BYTES = {"cpu": 25 << 20}
"""Bytes of a chunk of logits, unless the head's weight is larger: a CPU's last-level cache."""
LOGITS_BYTES_DEVICE = 512 << 20
"""Bytes of a chunk of logits on a GPU: enough rows to keep it busy."""


def keeps_probabilities(queries: int, keys: int, head_dim: int, *, spares: bool) -> bool:
    """Whether attention on a CPU keeps its probabilities for the backward.

    queries  all that a layer has here: rows of a micro-batch times heads times tokens.
    keys     tokens of a whole row.
    spares   the layer is recomputed, because memory is scarce: only short rows keep them.
    """
    if keys <= KEEP * head_dim:
        return True
    # Causal: a block of queries sees the keys up to its own end.
    return not spares and queries * (keys + QUERIES) // 2 <= KEEP_NUMBERS


def logits_rows(V: int, C: int, itemsize: int, device: str) -> int:
    """Rows in one chunk of logits over V tokens of `itemsize` bytes; C is the width of the model.

    At least C rows: the chunk is then as large as the head's weight, which each chunk reads once.
    """
    bytes_of_chunk = LOGITS_BYTES.get(device, LOGITS_BYTES_DEVICE)
    return max(1, C, bytes_of_chunk // (V * itemsize))


Recompute = Literal["", "full", "selective"]
"""What one layer computes again in the backward pass; "" stores everything. See
castalia.models.recompute."""


def kind_of(recompute: bool | str | int, layer: int) -> Recompute:
    """The kind of recompute of `layer`, for train.recompute.

    True and "full" mean every layer, "selective" too, n every n-th layer in full.
    """
    # bool first: True is an integer as well, and would mean "every layer" by accident only.
    if isinstance(recompute, bool):
        return "full" if recompute else ""
    if isinstance(recompute, str):
        return cast(Recompute, recompute)
    return "full" if layer % recompute == 0 else ""
