"""The selective scan of Mamba: one decay for each channel and number of its state.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = C_t h_t

Shapes: B batch, T tokens, E channels, N numbers that a channel remembers.

Source  Gu and Dao 2023, arXiv:2312.00752, algorithm 2 (ZOH for A, Euler for B, as published).
"""

import torch
from torch import Tensor

from castalia.recurrent.compiled_scan import CHUNK as COMPILED_CHUNK
from castalia.recurrent.compiled_scan import compiled_backward, compiled_scan, library_for
from castalia.recurrent.held import decayed
from castalia.recurrent.scan_gradients import differentiable

CHUNK_NUMBERS = 1 << 18
"""Numbers of the states of a chunk, so that a chunk stays in the cache of a core."""
SHORTEST = 32
"""Tokens of a chunk, at least: its state at the border is kept for the backward."""


def scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: u, dt (B, E), A (E, N), B, C (B, N), h (B, E, N) -> y (B, E) and the next
    h, which is written over the last one if there are no gradients."""
    h = decayed(h, (dt[..., None] * A).exp_())
    h.addcmul_((dt * u)[..., None], B[:, None])
    return (C[:, None] @ h.mT)[:, 0], h


def scan_by_token(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, which `selective_scan` is tested against; see there."""
    h = u.new_zeros(len(u), *A.shape) if h is None else h.clone()
    outputs = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = h * ~starts[:, t, None, None]
        y, h = scan_step(u[:, t], dt[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y)
    return torch.stack(outputs, 1), h


def chunk_size(batch: int, channels: int, size: int) -> int:
    """Tokens of a chunk."""
    return max(SHORTEST, CHUNK_NUMBERS // (batch * channels * size))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    h: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E) in the dtype of A, and the state after the last token, (B, E, N).

    Shapes  u, dt (B, T, E), A (E, N), B, C (B, T, N); starts bool (B, T): the state is forgotten
            before these tokens; h (B, E, N), the state before the first token, by default 0.
    chunk   tokens whose states are in memory at a time; a matter of speed alone.
    Gradients flow from y to u, dt, A, B and C; the states have none.
    """
    if chunk is not None:
        length = chunk
    elif library_for(A) is not None:
        length = COMPILED_CHUNK
    else:
        length = chunk_size(len(u), *A.shape)
    y, _, last = scan_chunks(u, dt, A, B, C, starts, h, length)
    return y, last


def by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, ...) -> (L, B, ...), contiguous: every step of the recurrence reads one block."""
    return x.transpose(0, 1).to(dtype).contiguous()


class ChunkStates:
    """Decays and states of a chunk of L tokens, from the state before it."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, starts: Tensor | None, h: Tensor
    ) -> None:
        """u, dt, B and starts are those of the chunk, (B, L, ...)."""
        self.dt = by_token(dt, A.dtype)
        self.u = by_token(u, A.dtype)
        self.B = by_token(B, A.dtype)
        self.x = self.dt * self.u
        self.decays = (self.dt[..., None] * A).exp_()
        if starts is not None:
            self.decays.masked_fill_(starts.t()[..., None, None], 0)
        self.before = h
        self.states = self.x[..., None] * self.B[:, :, None]
        for state, decay in zip(self.states, self.decays, strict=True):
            state.addcmul_(decay, h)
            h = state


@torch.library.custom_op("castalia::selective_scan", mutates_args=())
def scan_chunks(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    h: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `selective_scan`; also returns the states before each chunk, (T / chunk, B, E, N)."""
    library = library_for(A)
    if library is not None:
        return compiled_scan(library, u, dt, A, B, C, starts, h, chunk)
    size, T, E = u.shape
    h = A.new_zeros(size, *A.shape) if h is None else h
    y = torch.empty(size, T, E, dtype=A.dtype, device=u.device)
    borders = A.new_empty(-(-T // chunk), size, *A.shape)
    for number, first in enumerate(range(0, T, chunk)):
        here = slice(first, first + chunk)
        borders[number] = h
        begins = None if starts is None else starts[:, here]
        part = ChunkStates(u[:, here], dt[:, here], A, B[:, here], begins, h)
        C_here = by_token(C[:, here], A.dtype)
        y[:, here] = (part.states @ C_here[..., None])[..., 0].transpose(0, 1)
        h = part.states[-1]
    return y, borders, h.clone()


@scan_chunks.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    h: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size, T, _ = u.shape
    return (
        A.new_empty(u.shape),
        A.new_empty(-(-T // chunk), size, *A.shape),
        A.new_empty(size, *A.shape),
    )


@torch.library.custom_op("castalia::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    borders: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B and C, the states computed again chunk by chunk, last to first."""
    library = library_for(A)
    if library is not None:
        return compiled_backward(library, dy, borders, u, dt, A, B, C, starts, chunk)
    T = u.shape[1]
    du = torch.empty_like(u)
    ddt = torch.empty_like(dt)
    dA = torch.zeros_like(A)
    dB = torch.empty_like(B)
    dC = torch.empty_like(C)
    # What the tokens behind a chunk say about the state at its end.
    behind: Tensor | None = None
    for number in reversed(range(len(borders))):
        here = slice(number * chunk, min(T, (number + 1) * chunk))
        begins = None if starts is None else starts[:, here]
        part = ChunkStates(u[:, here], dt[:, here], A, B[:, here], begins, borders[number])
        dy_here = by_token(dy[:, here], A.dtype)
        d_states = dy_here[..., None] * by_token(C[:, here], A.dtype)[:, :, None]
        if behind is not None:
            d_states[-1] += behind
        for i in range(len(d_states) - 2, -1, -1):
            d_states[i].addcmul_(part.decays[i + 1], d_states[i + 1])
        behind = part.decays[0] * d_states[0]
        dC[:, here] = (dy_here[:, :, None] @ part.states)[:, :, 0].transpose(0, 1)
        dB[:, here] = (part.x[:, :, None] @ d_states)[:, :, 0].transpose(0, 1)
        dx = (d_states @ part.B[..., None])[..., 0]
        du[:, here] = (dx * part.dt).transpose(0, 1)
        # In place, since nobody needs the gradients of the states any more: those of dt A.
        d_exponents = d_states.mul_(part.decays)
        d_exponents[0].mul_(part.before)
        d_exponents[1:].mul_(part.states[:-1])
        dA += torch.einsum("lben,lbe->en", d_exponents, part.dt)
        ddt[:, here] = ((d_exponents * A).sum(-1) + dx * part.u).transpose(0, 1)
    return du, ddt, dA, dB, dC


@scan_backward.register_fake
def _(
    dy: Tensor,
    borders: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    same = [torch.empty_like(x) for x in (u, dt, A, B, C)]
    return same[0], same[1], same[2], same[3], same[4]


differentiable(scan_chunks, scan_backward)
