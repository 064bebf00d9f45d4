"""The scan of Mamba 2, whose heads have one decay each, in chunks by matrix products.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'       y_t = h_t C_t

Within a chunk it is attention without softmax: y_t = sum over s <= t of (C_t B_s) exp(a_t - a_s)
dt_s x_s, with a the sums of dt A since the chunk began. Between chunks the state carries on.

Shapes: S rows, T tokens, L tokens of a chunk, G groups of R heads, P channels of a head, N numbers
that a channel remembers.

Source  Dao and Gu 2024, arXiv:2405.21060, section 6.
"""

import torch
from torch import Tensor

from castalia.recurrent.held import decayed
from castalia.recurrent.scan_gradients import differentiable


def dual_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x (S, G, R, P), dt (S, G, R), A (G, R), B, C (S, G, N), h (S, G, R, P, N) -> y as
    x, and the next h, which is written over the last one if there are no gradients."""
    h = decayed(h, torch.exp(dt * A)[..., None, None])
    h.addcmul_((dt[..., None] * x)[..., None], B[:, :, None, None])
    # All heads of a group in one product, from the left: the kernel for several columns is faster.
    y = C[:, :, None] @ h.flatten(2, 3).mT
    return y.view(x.shape), h


def dual_by_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, which `dual_scan` is tested against; see there."""
    S, T, G, R, P = x.shape
    h = A.new_zeros(S, G, R, P, B.shape[-1]) if h is None else h.clone()
    outputs = []
    for t in range(T):
        if starts is not None:
            h = h * ~starts[:, t, None, None, None, None]
        y, h = dual_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y)
    return torch.stack(outputs, 1), h


def dual_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    h: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """y (S, T, G, R, P) in the dtype of A, and the state after the last token, (S, G, R, P, N).

    Shapes  x (S, T, G, R, P), dt (S, T, G, R), A (G, R), B, C (S, T, G, N); starts bool (S, T): the
            state is forgotten before these tokens; h (S, G, R, P, N), by default 0.
    chunk   tokens of a chunk; a matter of speed alone.
    Gradients flow from y to x, dt, A, B and C; the states have none.
    """
    y, _, last = dual_chunks(x, dt, A, B, C, starts, h, chunk)
    return y, last


def by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, L, G, R, ...) -> (S, G, R, L, ...)."""
    return x.to(dtype).movedim(1, 3)


def by_group(x: Tensor) -> Tensor:
    """(S, G, R, L, P) -> (S, G, L, R * P), for one product of all heads of a group."""
    return x.transpose(2, 3).flatten(3)


def of_heads(x: Tensor, R: int) -> Tensor:
    """(S, G, L, R * P) -> (S, G, R, L, P)."""
    return x.unflatten(3, (R, -1)).transpose(2, 3)


class DualChunk:
    """Decays and products of one chunk."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None
    ) -> None:
        """The tensors are those of the chunk, (S, L, ...)."""
        L = x.shape[1]
        self.dt = by_head(dt, A.dtype)
        self.x = by_head(x, A.dtype)
        self.steps = self.x * self.dt[..., None]
        self.B = B.to(A.dtype).transpose(1, 2)
        self.C = C.to(A.dtype).transpose(1, 2)
        # A strong decay makes the sums large, and in fp32 the gaps between them would lose digits:
        # each sum is a number of fp32 and what it leaves out.
        exact = (self.dt * A[..., None]).cumsum(-1, dtype=torch.float64)
        sums = exact.to(A.dtype)
        rest = (exact - sums).to(A.dtype)
        seen = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        before = sums
        after = (exact[..., -1:] - exact).to(A.dtype)
        whole = sums[..., -1]
        if starts is not None:
            # A document sees itself alone: neither earlier ones here nor the state before.
            documents = starts.cumsum(1)[:, None, None]
            seen = seen & (documents[..., None] == documents[..., None, :])
            before = before.masked_fill(documents > 0, -torch.inf)
            after = after.masked_fill(documents != documents[..., -1:], -torch.inf)
            whole = whole.masked_fill(documents[..., -1] > 0, -torch.inf)
        # Masked before the exponential, which overflows above the diagonal.
        gaps = sums[..., None] - sums[..., None, :]
        gaps.add_(rest[..., None]).sub_(rest[..., None, :])
        self.decays = gaps.masked_fill_(~seen, -torch.inf).exp_()
        self.before = before.exp()[..., None]
        """What is left of the state before the chunk at each token, (S, G, R, L, 1)."""
        self.after = after.exp()[..., None]
        """What is left of each token at the end of the chunk, (S, G, R, L, 1)."""
        self.whole = whole.exp()[..., None, None]
        self.weights = (self.C @ self.B.mT)[:, :, None] * self.decays

    def outputs(self, h: Tensor) -> Tensor:
        """y (S, G, R, L, P)."""
        R = h.shape[2]
        read = of_heads(self.C @ h.flatten(2, 3).mT, R)
        return torch.addcmul(self.weights @ self.steps, read, self.before)

    def end(self, h: Tensor) -> Tensor:
        """The state after the chunk."""
        written = by_group(self.steps * self.after).mT @ self.B
        return torch.addcmul(written.view(h.shape), h, self.whole)


@torch.library.custom_op("castalia::dual_scan", mutates_args=())
def dual_chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    h: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dual_scan`; also returns the states before each chunk, (T / chunk, S, G, R, P, N)."""
    S, T, G, R, P = x.shape
    h = A.new_zeros(S, G, R, P, B.shape[-1]) if h is None else h
    y = torch.empty(x.shape, dtype=A.dtype, device=x.device)
    borders = A.new_empty(-(-T // chunk), *h.shape)
    for number, first in enumerate(range(0, T, chunk)):
        here = slice(first, first + chunk)
        borders[number] = h
        begins = None if starts is None else starts[:, here]
        part = DualChunk(x[:, here], dt[:, here], A, B[:, here], C[:, here], begins)
        y[:, here] = part.outputs(h).movedim(3, 1)
        h = part.end(h)
    return y, borders, h.clone()


@dual_chunks.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    h: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    S, T, G, R, P = x.shape
    state = (S, G, R, P, B.shape[-1])
    return A.new_empty(x.shape), A.new_empty(-(-T // chunk), *state), A.new_empty(state)


class DualGradients:
    """Gradients of what one chunk reads, out of those of its outputs and of the state behind it."""

    def __init__(self, part: DualChunk, h: Tensor, dy: Tensor, behind: Tensor | None) -> None:
        """h, behind (S, G, R, P, N), dy (S, G, R, L, P)."""
        R = h.shape[2]
        d_weights = dy @ part.steps.mT
        d_products = (d_weights * part.decays).sum(2)
        # Of the exponents: a decay from s to t falls with the sum up to t and grows with that to s.
        d_gaps = d_weights.mul_(part.weights)
        d_sums = d_gaps.sum(-1) - d_gaps.sum(-2)
        self.d_steps = part.weights.mT @ dy
        read = of_heads(part.C @ h.flatten(2, 3).mT, R)
        d_read = dy * part.before
        d_sums += (d_read * read).sum(-1)
        wide = by_group(d_read)
        self.dC = d_products @ part.B + wide @ h.flatten(2, 3)
        self.dB = d_products.mT @ part.C
        self.dh = (wide.mT @ part.C).view(h.shape)
        if behind is not None:
            flat = behind.flatten(2, 3)
            self.dB += by_group(part.steps * part.after) @ flat
            d_written = of_heads(part.B @ flat.mT, R) * part.after
            self.d_steps += d_written
            # The exponents of `after` and `whole` end with the sum of the whole chunk.
            left = (d_written * part.steps).sum(-1)
            d_sums -= left
            d_sums[..., -1] += left.sum(-1)
            d_sums[..., -1] += ((behind * h).sum(-1).sum(-1)) * part.whole[..., 0, 0]
            self.dh.addcmul_(behind, part.whole)
        # Every sum from a token on contains its exponent dt A.
        self.d_exponents = d_sums.flip(-1).cumsum(-1).flip(-1)


@torch.library.custom_op("castalia::dual_scan_backward", mutates_args=())
def dual_backward(
    dy: Tensor,
    borders: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B and C, chunk by chunk, last to first."""
    T = x.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dA = torch.zeros_like(A)
    dB = torch.empty(B.shape, dtype=B.dtype, device=x.device)
    dC = torch.empty(C.shape, dtype=C.dtype, device=x.device)
    # What the tokens behind a chunk say about the state at its end.
    behind: Tensor | None = None
    for number in reversed(range(len(borders))):
        here = slice(number * chunk, min(T, (number + 1) * chunk))
        begins = None if starts is None else starts[:, here]
        part = DualChunk(x[:, here], dt[:, here], A, B[:, here], C[:, here], begins)
        made = DualGradients(part, borders[number], by_head(dy[:, here], A.dtype), behind)
        behind = made.dh
        dx[:, here] = (made.d_steps * part.dt[..., None]).movedim(3, 1)
        by_step = (made.d_steps * part.x).sum(-1) + made.d_exponents * A[..., None]
        ddt[:, here] = by_step.movedim(3, 1)
        dA += (made.d_exponents * part.dt).sum((0, -1))
        dB[:, here] = made.dB.transpose(1, 2)
        dC[:, here] = made.dC.transpose(1, 2)
    return dx, ddt, dA, dB, dC


@dual_backward.register_fake
def _(
    dy: Tensor,
    borders: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    same = [each.new_empty(each.shape) for each in (x, dt, A, B, C)]
    return same[0], same[1], same[2], same[3], same[4]


differentiable(dual_chunks, dual_backward)
