"""The recurrence of RWKV 7, token by token and in chunks.

Of each head, with a matrix S (N keys, N values) that is 0 at the start of a document:

    S  <- diag(w_t) S + b_t^T (a_t S) + k_t^T v_t,  w_t = exp(log w_t), log w_t in (-0.61, 0)
    o_t = r_t S

a is the key whose value is removed, negative, and b the same key times the rate of the removal:
a generalized delta rule. Source  Peng et al. 2025, arXiv:2503.14456, section 3.
"""

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.recurrent.held import decayed
from castalia.recurrent.options import CHUNK
from castalia.recurrent.token_shift import ChunkRuns, into_chunks, out_of_chunks

LARGEST = 64
"""Factors of a longer chunk reach exp(0.61 * 128 / 2) = 8e16 and cost digits of fp32."""


def wkv7_by_token(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state_BHNN: Tensor,
    runs_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, for generation and as the reference of the chunks.

    Shapes  r, log_w, k, v, a, b (B, T, H, N), state_BHNN (B, H, N, N) -> outputs (B, T, H, N) and
            the state after the last token, all fp32.
    runs_BT (B, T) int64, the number of each token's document; a change resets the state.
    """
    outs = []
    state_BHNN = state_BHNN.clone()
    for t in range(r.shape[1]):
        if runs_BT is not None and t:
            goes_on = (runs_BT[:, t] == runs_BT[:, t - 1]).float()
            state_BHNN = state_BHNN * goes_on[:, None, None, None]
        out_BHN, state_BHNN = wkv7_step(
            r[:, t], log_w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state_BHNN
        )
        outs.append(out_BHN)
    return torch.stack(outs, 1), state_BHNN


def wkv7_step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state_BHNN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, r, log_w, k, v, a, b (B, H, N) -> its output (B, H, N) and the state after it,
    which is written over the one before if there are no gradients."""
    removed = a[:, :, None] @ state_BHNN
    state_BHNN = decayed(state_BHNN, log_w[..., None].exp())
    state_BHNN.addcmul_(b[..., None], removed).addcmul_(k[..., None], v[:, :, None])
    return (r[:, :, None] @ state_BHNN)[:, :, 0], state_BHNN


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state_BHNN: Tensor,
    runs_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of tokens, whose parts are matrix products; shapes as `wkv7_by_token`.

    What token t removes, u_t = a_t S, depends on what the tokens before it removed. Within a chunk
    that is a triangular system, (1 - A) U = A' V + P S with A of pairs of a and b, A' of a and k,
    and P what is left of S: the WY form. It is solved for all chunks at once, apart from S, which
    the chunks then hand on. Factors are taken from the middle of the chunk; RWKV 7 bounds its
    decays, so that they stay far below the range of fp32.
    chunk    1 to 64.

    Source  Yang et al. 2024, arXiv:2406.06484, section 3.2 (the WY form of the delta rule).
    Raises  ConfigError if `chunk` is not in 1..64.
    """
    if not 1 <= chunk <= LARGEST:
        raise ConfigError(f"chunks of wkv7 have 1 to {LARGEST} tokens, not {chunk}")
    T = r.shape[1]
    r, log_w, k, v, a, b = (into_chunks(x, chunk) for x in (r, log_w, k, v, a, b))
    runs = None if runs_BT is None else ChunkRuns(runs_BT, chunk)
    upto = log_w.cumsum(-2)
    middle = upto[..., chunk // 2, None, :]
    # a reads the state before its token decays it, r the one after its token wrote.
    readers = torch.cat([a * (upto - log_w - middle).exp(), r * (upto - middle).exp()], -2)
    fade = (middle - upto).exp()
    writers = torch.cat([b * fade, k * fade], -2)
    pairs = pairs_of(readers, writers, runs)
    a_b, a_k, r_b, r_k = pairs
    readers = readers * middle.exp()
    writers = writers * (upto[..., -1:, :] - middle).exp()
    keeps = upto[..., -1:, :].exp().transpose(-1, -2)
    if runs is not None:
        readers = readers * runs.began.repeat(1, 1, 1, 2, 1)
        writers = writers * runs.lasts.repeat(1, 1, 1, 2, 1)
        keeps = keeps * runs.through
    a_reads, r_reads = readers.split(chunk, -2)
    solved = torch.linalg.solve_triangular(
        -a_b, torch.cat([a_k @ v, a_reads], -1), upper=False, unitriangular=True
    )
    own, of_state = solved.split(v.shape[-1], -1)
    b_writes, k_writes = writers.transpose(-1, -2).split(chunk, -1)
    written = k_writes @ v
    states = []
    removed = []
    # Taken apart once: the gradient of an index into all chunks is a tensor of all chunks.
    parts = (x.unbind(2) for x in (own, of_state, b_writes, written, keeps))
    for own_c, of_state_c, b_writes_c, written_c, keep in zip(*parts, strict=True):
        states.append(state_BHNN)
        removed.append(own_c + of_state_c @ state_BHNN)
        state_BHNN = keep * state_BHNN + b_writes_c @ removed[-1] + written_c
    out = r_k @ v + r_b @ torch.stack(removed, 2) + r_reads @ torch.stack(states, 2)
    return out_of_chunks(out, T), state_BHNN


def pairs_of(readers: Tensor, writers: Tensor, runs: ChunkRuns | None) -> tuple[Tensor, ...]:
    """Products of what reads and what writes at pairs of tokens of a chunk, each (…, L, L).

    Shapes  readers, of a and r, and writers, of b and k, (B, H, n, 2 L, N) -> a with b, a with k
            (earlier tokens only), r with b, r with k (the token itself too).
    """
    L = readers.shape[-2] // 2
    products = readers @ writers.transpose(-1, -2)
    if runs is not None:
        products = products * runs.pairs.repeat(1, 1, 1, 2, 2)
    of_a, of_r = products.split(L, -2)
    earlier = of_a.unflatten(-1, (2, L)).transpose(-2, -3).tril(-1)
    upto = of_r.unflatten(-1, (2, L)).transpose(-2, -3).tril()
    return (*earlier.unbind(-3), *upto.unbind(-3))
