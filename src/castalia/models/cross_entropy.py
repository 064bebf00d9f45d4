"""Cross-entropy of the output head that never holds the whole logits matrix.

Logits x = h W^T of N rows over V tokens would take N * V numbers three times over (logits, probabilities, gradient).
Here a chunk of rows is turned into its loss and both gradients while its logits lie in the cache, and the next chunk
takes their place. With m = max x, E = exp(x - m), S = sum E and the target t of each row,

    loss = m + log S - x_t            d loss / dx = (E - S [j = t]) / S

so E - S [j = t] stands in for the gradient of the logits, its row factor 1 / S goes to the small (rows, C) matrices,
and the large one is touched by one elementwise pass and three matrix products:

    dh = (1 / S) (E - S [j = t]) W    dW += (E - S [j = t])^T (h / S)

Where processes share the vocabulary (`VocabPart`), each makes the logits of its own tokens only; m, S and x_t of a row
are agreed between them, three numbers a row, and dh is this process's addend. With m_r, S_r seen by process r,

    S = sum_r S_r exp(m_r - m)        E_r - S exp(m - m_r) [j = t] and 1 / (S exp(m - m_r)) in place of the above

Source  the chunked loss of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2; the unnormalized E is ours.
"""

import math
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castalia.models.tiles import logits_rows

IGNORED = -100
"""Label of a row that is no target."""
LOG2_E = math.log2(math.e)
BLOCK_ROWS = {("cpu", False): 32, ("cpu", True): 64}
"""Rows that the elementwise pass works on at a time, by device and whether it is compiled: on a CPU, without a compiler
so many that their float32 copy stays in the cores' own caches; elsewhere the whole chunk."""
GRADIENT_BLOCK = 1 << 20
"""Numbers of dW that one product makes at a time on a CPU, so that adding them to the sum finds them in the cache."""
FP16_SUM = 16.0
"""What each row of E sums to in fp16, which holds neither a sum of V ones nor 1 / V well."""
FARTHEST = 60.0
"""m - m_r counts as at most this: e^60 is a float32, and the probability e^-60 that it stands for is 0."""


class VocabPart(Protocol):
    """The tokens of the vocabulary that this process holds, and how it agrees with those that hold the others.

    first  id of the first of them.
    count  size of the whole padded vocabulary.
    """

    first: int
    count: int

    def local(self, weight: Tensor) -> Tensor:
        """The rows of the head's weight that this process holds, as a plain tensor."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place and returned."""

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the processes, in place and returned."""


class CrossEntropy(NamedTuple):
    """`total`, a float32 scalar with a gradient; `rows` (N,) float32 without one, 0 where the label is ignored."""

    total: Tensor
    rows: Tensor


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignored: int = IGNORED,
    compiled: bool = False,
    chunk_rows: int | None = None,
    part: VocabPart | None = None,
) -> CrossEntropy:
    """Sum over the rows of -log softmax(hidden W^T)[label], and each row's share.

    Shapes  hidden (N, C); weight (V, C); labels (N,) int64, `ignored` where a row does not count.
    Units   nats.
    The matrix products run in autocast's dtype, or outside autocast in the wider of the two dtypes; maxima, sums,
    losses and the accumulation of dW are float32. Both gradients are made in the forward pass when grad is enabled and
    something needs them, so a graph through here can be differentiated once. `compiled` gives the elementwise pass to
    torch.compile. `chunk_rows` is the number of rows at a time; None chooses by device. With `part`, weight is the
    part of the head that this process holds; total and rows are those of the whole vocabulary, on every process, and
    the gradient of hidden is this process's addend.
    Raises  ValueError if shapes do not fit, IndexError if a label is neither `ignored` nor in 0..V-1.
    """
    weight = weight if part is None else part.local(weight)
    require_shapes(hidden, weight, labels)
    require_labels(labels, ignored, weight.shape[0] if part is None else part.count)
    dtype = compute_dtype(hidden, weight)
    chunks = chunk_slices(
        len(hidden),
        chunk_rows
        or logits_rows(weight.shape[0], weight.shape[1], dtype.itemsize, weight.device.type),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            options = (ignored, dtype, chunks, compiled, part)
            return CrossEntropy(*FusedCrossEntropy.apply(hidden, weight, labels, *options))
        wide, rows = weight.to(dtype), hidden.new_empty(len(hidden), dtype=torch.float32)
        for at in chunks:
            _, rows[at], _ = to_gradient(
                hidden[at].to(dtype) @ wide.T, labels[at], ignored, compiled, part
            )
    return CrossEntropy(rows.sum(), rows)


class FusedCrossEntropy(torch.autograd.Function):
    """Losses and gradients of all chunks in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignored: int,
        dtype: torch.dtype,
        chunks: list[slice],
        compiled: bool,
        part: VocabPart | None,
    ) -> tuple[Tensor, Tensor]:
        """Total and losses of the rows; the gradients wait in `ctx`."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide, rows = weight.to(dtype), hidden.new_empty(len(hidden), dtype=torch.float32)
        d_hidden = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            if needs_hidden
            else None
        )
        d_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if needs_weight
            else None
        )
        for at in chunks:
            h = hidden[at].to(dtype)
            gradient, rows[at], factor = to_gradient(
                h @ wide.T, labels[at], ignored, compiled, part
            )
            if d_hidden is not None:
                d_hidden[at] = (gradient @ wide) * factor[:, None]
            if d_weight is not None:
                add_product(d_weight, gradient, (h * factor[:, None]).to(dtype))
            del gradient  # else it would live on while the next chunk's logits are made
        ctx.gradients = d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype)
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and let go of them, so that autograd need not copy the large one."""
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_cross_entropy was differentiated already; call it anew for a second backward"
            )
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.gradients)
        ctx.gradients = None
        return d_hidden, d_weight, None, None, None, None, None, None


def to_gradient(
    logits: Tensor, labels: Tensor, ignored: int, compiled: bool, part: VocabPart | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (R, V) to E - S [j = label], the losses and the row factors 1 / S, float32 (R,); logits are lost.

    Losses and factors are 0 in ignored rows. With `part`, logits are those of the tokens that this process holds.
    """
    counts, rows = labels != ignored, torch.arange(len(labels), device=labels.device)
    places = torch.where(counts, labels - (part.first if part else 0), 0)
    here = (places >= 0) & (places < logits.shape[1])
    places = torch.where(here, places, 0)
    at_target = logits[rows, places].float()
    e, top, total = exponentials_in_place(logits, compiled)
    if part is None:
        lse = top + total.log()
        losses = lse - at_target
    else:
        lse, losses, total = agree(e, top, total, torch.where(here, at_target, 0.0), part)
    if e.dtype == torch.float16:
        top, total = lse - math.log(FP16_SUM), torch.full_like(total, FP16_SUM)
    e[rows, places] = torch.where(
        here, ((at_target - top).exp() - total).to(e.dtype), e[rows, places]
    )
    return e, torch.where(counts, losses, 0.0), torch.where(counts, 1.0 / total, 0.0)


def agree(
    e: Tensor, top: Tensor, total: Tensor, at_target: Tensor, part: VocabPart
) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp, loss and S exp(m - m_r) of each row, out of what this process sees; at_target is 0 elsewhere.

    In fp16 the rows of `e` are scaled, in place, to their share of FP16_SUM.
    """
    highest = part.max(top.clone())
    share = total * (top - highest).exp()
    whole, at_target = part.sum(torch.stack([share, at_target])).unbind(0)
    if e.dtype == torch.float16:
        e.mul_((share / whole)[:, None])
    lse = highest + whole.log()
    return lse, lse - at_target, whole * (highest - top).clamp(max=FARTHEST).exp()


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E = exp(logits - m) (R, V) in the dtype of logits, and m and S, the row maxima and row sums of E, float32 (R,).

    Every number of E is at most 1, but in fp16, where each row of it sums to FP16_SUM.
    """
    e = logits.float()
    top = e.amax(1, keepdim=True)
    # torch's exp2 takes a quarter of the time of its exp on a CPU.
    e = e.sub_(top).mul_(LOG2_E).exp2_()
    total = e.sum(1, keepdim=True)
    scaled = e * (FP16_SUM / total) if logits.dtype == torch.float16 else e
    return scaled.to(logits.dtype), top.squeeze(1), total.squeeze(1)


def exponentials_in_place(logits: Tensor, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials` block by block of rows, E written over the logits, so that a second chunk is never needed."""
    rows = BLOCK_ROWS.get((logits.device.type, compiled), len(logits))
    one = compiled_exponentials() if compiled else exponentials
    tops, totals = [], []
    for block in logits.split(rows):
        e, top, total = one(block)
        block.copy_(e)
        tops.append(top)
        totals.append(total)
    return logits, torch.cat(tops), torch.cat(totals)


@cache
def compiled_exponentials() -> Any:
    """`exponentials` as one kernel."""
    return torch.compile(exponentials)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, C) += left^T right with left (R, V), right (R, C); on a CPU in blocks of rows of the total."""
    V, C = total.shape
    rows = V if total.device.type != "cpu" else max(1, GRADIENT_BLOCK // C)
    for at in range(0, V, rows):
        total[at : at + rows].add_(left[:, at : at + rows].T @ right)


def chunk_slices(N: int, rows: int) -> list[slice]:
    """Slices of at most `rows` rows that cover N rows, of about equal size."""
    count = -(-N // rows)
    rows = -(-N // max(1, count))
    return [slice(at, min(at + rows, N)) for at in range(0, N, rows)] if N else []


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the matrix products."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def require_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raises  ValueError unless hidden is (N, C), weight (V, C) and labels (N,)."""
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or labels.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "fused_cross_entropy wants hidden (N, C), weight (V, C) and labels (N,); got"
            f" {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )


def require_labels(labels: Tensor, ignored: int, V: int) -> None:
    """Raises  IndexError if a label is neither `ignored` nor in 0..V-1; on a GPU a device assert, without a wait."""
    fits = ((labels >= 0) & (labels < V)) | (labels == ignored)
    if labels.device.type == "cuda":
        torch._assert_async(fits.all())
    elif not bool(fits.all()):
        wrong = labels[~fits]
        raise IndexError(
            f"label {int(wrong[0])} of row {int((~fits).nonzero()[0])} is neither {ignored} nor in 0..{V - 1}"
        )
