"""Cross-entropy of the output head without ever holding the whole logits matrix.

The logits x = h W^T of N rows over V tokens would be stored three times (logits, probabilities,
gradient). Here the logits of a chunk of rows become the loss and both gradients while they are in
cache, and the next chunk reuses their memory. With m = max x, E = exp(x - m), S = sum E and the
target t of each row,

    loss = m + log S - x_t            d loss / dx = (E - S [j = t]) / S

E - S [j = t] stands in for the gradient of the logits. Its row factor 1 / S is applied to the small
(rows, C) matrices instead, so the large matrix is touched by one elementwise pass and three matrix
products:

    dh = (1 / S) (E - S [j = t]) W    dW += (E - S [j = t])^T (h / S)

A weight w of a row multiplies its row factor: w / S in place of 1 / S. Weighted rows therefore cost
N multiplications more and share every other instruction with unweighted ones.

Under a vocabulary-parallel head (`VocabShare`) each rank computes the logits of its own tokens. The
ranks reduce m, S and x_t, three numbers a row, and dh is this rank's addend. With m_r and S_r of
rank r,

    S = sum_r S_r exp(m_r - m)        E_r - S exp(m - m_r) [j = t] and 1 / (S exp(m - m_r))

replace the terms above.

Source  the chunked loss of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2; the
        unnormalized E is ours.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from castalia.core.private_cache import keep_compiled_code_private
from castalia.models.context import VocabShare
from castalia.models.tiles import logits_rows
from castalia.monitor.parts import HEAD, part
from castalia.products import ONEDNN, TORCH, Products, head_products

LOG2_E = math.log2(math.e)
BLOCK_ROWS = {("cpu", False): 32, ("cpu", True): 64}
"""Rows of one elementwise pass, by device and whether it is compiled. On a CPU the float32 copy of
so many rows stays in a core's own caches; other devices take the whole chunk."""
GRADIENT_BLOCK = 1 << 20
"""Numbers of dW that one product computes on a CPU, so that the sum still finds them in cache."""
FP16_SUM = 16.0
"""Row sum of E in fp16, which can represent neither a sum of V ones nor 1 / V accurately."""
FARTHEST = 60.0
"""Upper limit of m - m_r: e^60 fits float32, and a probability of e^-60 counts as 0."""


class CrossEntropy(NamedTuple):
    """Loss of a call: `total`, a float32 scalar with a gradient, and the unweighted `rows`.

    Shapes  rows (N,) float32 without a gradient, 0 where the label is ignored.
    """

    total: Tensor
    rows: Tensor


class ChunkPlan(NamedTuple):
    """The choices of one call that stay the same for all of its chunks."""

    ignored: int
    dtype: torch.dtype
    chunks: list[slice]
    compiled: bool
    part: VocabShare | None
    products: Products


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    ignored: int = -100,
    compiled: bool = False,
    chunk_rows: int | None = None,
    part: VocabShare | None = None,
    onednn: bool = False,
) -> CrossEntropy:
    """Sum over the rows of w * -log softmax(hidden W^T)[label], and each row's unweighted loss.

    Shapes  hidden (N, C); weight (V, C); labels (N,) int64, `ignored` where a row does not count
            (-100 by default, as in torch's cross_entropy); weights (N,) float32, None for ones.
    Units   nats.
    Raises  ValueError if shapes do not fit or `weights` requires a gradient; IndexError if a label
            is neither `ignored` nor in 0..V-1.

    The weights are constants: they scale the gradients of hidden and weight and get none. A loss
    that is a non-linear function of row losses passes its own derivative here, in a second call.

    Matrix products run in autocast's dtype, or outside autocast in the wider of the two dtypes.
    Maxima, sums, losses and the accumulation of dW are float32. Both gradients are computed in the
    forward pass, so a graph through this function can be differentiated once.

    compiled    gives the elementwise pass to torch.compile.
    chunk_rows  rows at a time; None chooses by device.
    part        `weight` is this rank's part of the head. `total` and `rows` are those of the whole
                vocabulary on every rank; the gradient of hidden is this rank's addend.
    onednn      lets oneDNN compute large products of float32 on a CPU.
    """
    weight = weight if part is None else part.local(weight)
    require_shapes(hidden, weight, labels, weights)
    V, C = weight.shape
    require_labels(labels, ignored, V if part is None else part.count)
    if weights is not None:
        # A NaN weight of an ignored row would otherwise pass through its factor of 0.
        weights = weights.float().masked_fill(labels == ignored, 0.0)
    dtype = compute_dtype(hidden, weight)
    if chunk_rows is None:
        chunk_rows = logits_rows(V, C, dtype.itemsize, weight.device.type)
    shape = (min(len(hidden), chunk_rows), C, V)
    products = head_products(onednn, dtype, weight.device, shape)
    chunks = chunk_slices(len(hidden), chunk_rows)
    plan = ChunkPlan(ignored, dtype, chunks, compiled, part, products)
    # The dtype is chosen above; autocast must not convert again inside.
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            apply: Callable[..., tuple[Tensor, Tensor]] = FusedCrossEntropy.apply
            return CrossEntropy(*apply(hidden, weight, labels, weights, plan))
        rows = losses_only(hidden, weight, labels, plan)
    return CrossEntropy(total_of(rows, weights), rows)


def losses_only(hidden: Tensor, weight: Tensor, labels: Tensor, plan: ChunkPlan) -> Tensor:
    """The losses of all rows (N,), without the products that only gradients need."""
    wide = weight.to(plan.dtype)
    rows = hidden.new_empty(len(hidden), dtype=torch.float32)
    for at in plan.chunks:
        logits = logits_of(hidden[at].to(plan.dtype), wide, plan.products)
        _, rows[at], _ = to_gradient(logits, labels[at], plan.ignored, plan.compiled, plan.part)
    return rows


def logits_of(hidden: Tensor, weight: Tensor, products: Products) -> Tensor:
    """Logits of one chunk, (N, C), (V, C) -> (N, V)."""
    with part(HEAD):
        return products.linear(hidden, weight)


def total_of(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum. Without weights it is a plain sum, so that its bits stay those of one."""
    if weights is None:
        return rows.sum()
    return (rows * weights).sum()


class FusedCrossEntropy(torch.autograd.Function):
    """Losses and gradients of all chunks in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        plan: ChunkPlan,
    ) -> tuple[Tensor, Tensor]:
        """Total and losses of the rows; the gradients wait in `ctx`."""
        dtype = plan.dtype
        wide = weight.to(dtype)
        rows = hidden.new_empty(len(hidden), dtype=torch.float32)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            # float32 whatever the products are in: thousands of chunks add up here.
            d_weight = new_total(weight, plan.products)
        for at in plan.chunks:
            h = hidden[at].to(dtype)
            logits = logits_of(h, wide, plan.products)
            gradient, rows[at], factor = to_gradient(
                logits, labels[at], plan.ignored, plan.compiled, plan.part
            )
            if weights is not None:
                factor = factor * weights[at]
            if d_hidden is not None:
                product = plan.products.input_gradient(gradient, wide)
                d_hidden[at] = product * factor[:, None]
            if d_weight is not None:
                scaled = (h * factor[:, None]).to(dtype)
                add_product(d_weight, gradient, scaled, plan.products)
            del gradient, logits  # else it would live on while the next chunk's logits are computed
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype).contiguous()
        ctx.gradients = (d_hidden, d_weight)
        ctx.mark_non_differentiable(rows)
        return total_of(rows, weights), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and release them, so that autograd need not copy dW."""
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_cross_entropy was already differentiated; call it again for a second"
                " backward pass"
            )
        d_hidden, d_weight = (None if d is None else d.mul_(d_total) for d in ctx.gradients)
        ctx.gradients = None
        return d_hidden, d_weight, None, None, None


def to_gradient(
    logits: Tensor, labels: Tensor, ignored: int, compiled: bool, part: VocabShare | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (R, V) into E - S [j = label], in place; returned with losses and row factors.

    Shapes  losses and factors 1 / S are (R,) float32, both 0 in ignored rows.
    With `part`, the logits are those of this rank's tokens.
    """
    counts = labels != ignored
    rows = torch.arange(len(labels), device=labels.device)
    first = 0 if part is None else part.first
    # Ignored rows and labels of other ranks read place 0, and are masked out below: an index that
    # depends on data would need a sync on a GPU.
    places = torch.where(counts, labels - first, 0)
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
        # E was scaled to sum to FP16_SUM; moving the maximum keeps exp(x_t - top) consistent.
        top = lse - math.log(FP16_SUM)
        total = torch.full_like(total, FP16_SUM)
    at_label = ((at_target - top).exp() - total).to(e.dtype)
    e[rows, places] = torch.where(here, at_label, e[rows, places])
    return e, torch.where(counts, losses, 0.0), torch.where(counts, 1.0 / total, 0.0)


def agree(
    e: Tensor, top: Tensor, total: Tensor, at_target: Tensor, part: VocabShare
) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp, loss and S exp(m - m_r) of each row, reduced over the ranks of the vocabulary.

    at_target is 0 on the ranks that do not hold the target. In fp16 the rows of `e` are scaled, in
    place, to their share of FP16_SUM.
    """
    highest = part.max(top.clone())
    share = total * (top - highest).exp()
    # One reduction of both: a collective costs its latency, not its bytes.
    whole, at_target = part.sum(torch.stack([share, at_target])).unbind(0)
    if e.dtype == torch.float16:
        e.mul_((share / whole)[:, None])
    lse = highest + whole.log()
    return lse, lse - at_target, whole * (highest - top).clamp(max=FARTHEST).exp()


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E = exp(logits - m) (R, V) in the dtype of logits, its row maxima m and row sums S.

    Shapes  m and S (R,) float32. E is at most 1, except in fp16, where its rows sum to FP16_SUM.
    """
    e = logits.float()
    top = e.amax(1, keepdim=True)
    # On a CPU torch's exp2 takes a quarter of the time of its exp.
    e = e.sub_(top).mul_(LOG2_E).exp2_()
    total = e.sum(1, keepdim=True)
    scaled = e * (FP16_SUM / total) if logits.dtype == torch.float16 else e
    return scaled.to(logits.dtype), top.squeeze(1), total.squeeze(1)


def exponentials_in_place(logits: Tensor, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`exponentials` by blocks of rows. E overwrites the logits: a second chunk never exists."""
    rows = BLOCK_ROWS.get((logits.device.type, compiled), len(logits))
    one = compiled_exponentials() if compiled else exponentials
    tops = []
    totals = []
    for block in logits.split(rows):
        e, top, total = one(block)
        block.copy_(e)
        tops.append(top)
        totals.append(total)
    return logits, torch.cat(tops), torch.cat(totals)


@cache
def compiled_exponentials() -> Any:
    """`exponentials` as one kernel."""
    keep_compiled_code_private()
    return torch.compile(exponentials)


def new_total(weight: Tensor, products: Products) -> Tensor:
    """Zeros (V, C) float32 for `add_product`; a transposed view if its products are ones."""
    V, C = weight.shape
    if products is ONEDNN and C < V:
        # Its products come transposed, and are added as they lie; see weight_gradient.
        return torch.zeros(C, V, dtype=torch.float32, device=weight.device).t()
    return torch.zeros(V, C, dtype=torch.float32, device=weight.device)


def add_product(total: Tensor, left: Tensor, right: Tensor, products: Products = TORCH) -> None:
    """total (V, C) += left^T right for left (R, V), right (R, C); on a CPU by rows of total."""
    V, C = total.shape
    rows = max(1, GRADIENT_BLOCK // C)
    # oneDNN wants `left` whole: a slice of its columns is a view that it would have to copy.
    if total.device.type != "cpu" or products is ONEDNN:
        rows = V
    for at in range(0, V, rows):
        total[at : at + rows].add_(products.weight_gradient(left[:, at : at + rows], right))


def chunk_slices(N: int, rows: int) -> list[slice]:
    """Slices of at most `rows` rows that cover N rows, of about equal size."""
    # Equal sizes: a short last chunk would use the matrix units badly.
    count = -(-N // rows)
    rows = -(-N // max(1, count))
    return [slice(at, min(at + rows, N)) for at in range(0, N, rows)] if N else []


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the matrix products."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def require_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    """Raises  ValueError unless hidden is (N, C), weight (V, C), labels and weights (N,)."""
    fit = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fit or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "fused_cross_entropy wants hidden (N, C), weight (V, C) and labels (N,); got"
            f" {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if weights is None:
        return
    if weights.shape != labels.shape:
        raise ValueError(
            f"fused_cross_entropy wants weights ({len(labels)},), one a row; got"
            f" {tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("the weights of fused_cross_entropy get no gradient; detach them first")


def require_labels(labels: Tensor, ignored: int, V: int) -> None:
    """Raises  IndexError if a label is neither `ignored` nor in 0..V-1.

    A GPU raises a device assert instead, because reading the answer would wait for the device.
    """
    fits = ((labels >= 0) & (labels < V)) | (labels == ignored)
    if labels.device.type == "cuda":
        torch._assert_async(fits.all())
    elif not bool(fits.all()):
        place = int((~fits).nonzero()[0])
        raise IndexError(
            f"label {int(labels[place])} of row {place} is neither {ignored} nor in 0..{V - 1}"
        )
