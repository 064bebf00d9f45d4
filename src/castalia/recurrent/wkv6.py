"""The recurrence of RWKV 6, token by token and in chunks.

Of each head, with a matrix S (N keys, N values) that is 0 at the start of a document:

    o_t = r_t (S + (u * k_t)^T v_t)
    S  <- diag(w_t) S + k_t^T v_t,  w_t = exp(-exp(d_t)) in (0, 1)

Source  Peng et al. 2024, arXiv:2404.05892, section 4.2 and appendix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.recurrent.held import decayed
from castalia.recurrent.options import CHUNK
from castalia.recurrent.token_shift import ChunkRuns, into_chunks, out_of_chunks


def wkv6_by_token(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    bonus_HN: Tensor,
    state_BHNN: Tensor,
    runs_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, for generation and as the reference of the chunks.

    Shapes  r, k, v, log_w (B, T, H, N), bonus_HN (H, N), state_BHNN (B, H, N, N) -> outputs
            (B, T, H, N) and the state after the last token, all fp32.
    runs_BT (B, T) int64, the number of each token's document; a change resets the state.
    """
    outs = []
    state_BHNN = state_BHNN.clone()
    for t in range(r.shape[1]):
        if runs_BT is not None and t:
            goes_on = (runs_BT[:, t] == runs_BT[:, t - 1]).float()
            state_BHNN = state_BHNN * goes_on[:, None, None, None]
        out_BHN, state_BHNN = wkv6_step(
            r[:, t], k[:, t], v[:, t], log_w[:, t], bonus_HN, state_BHNN
        )
        outs.append(out_BHN)
    return torch.stack(outs, 1), state_BHNN


def wkv6_step(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, bonus_HN: Tensor, state_BHNN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, r, k, v, log_w (B, H, N) -> its output (B, H, N) and the state after it, which is
    written over the one before if there are no gradients."""
    own = (r * k * bonus_HN).sum(-1, keepdim=True) * v
    out_BHN = (r[:, :, None] @ state_BHNN)[:, :, 0] + own
    state_BHNN = decayed(state_BHNN, log_w[..., None].exp())
    return out_BHN, state_BHNN.addcmul_(k[..., None], v[:, :, None])


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    bonus_HN: Tensor,
    state_BHNN: Tensor,
    runs_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of tokens, whose parts are matrix products; shapes as `wkv6_by_token`.

    Within a chunk token t reads k_s^T v_s with the factor exp(log w_{s+1} + … + log w_{t-1}). The
    usual split into exp(sum up to t) * exp(-sum up to s) overflows where decays are strong. Here a
    chunk is halved until nothing is left: later tokens of a block read the earlier ones by way of
    the middle between them, with two factors that both are at most 1 and whose exponents are sums
    of terms of one sign. No difference of sums is ever taken, so no decay costs any digits.
    chunk    a power of two.
    Source  Yang et al. 2023, arXiv:2312.06635, section 4.3 (two levels of chunks).
    Raises  ConfigError if `chunk` is not a power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ConfigError(f"chunks of wkv6 are halved: choose a power of two, not {chunk}")
    T = r.shape[1]
    r, k, v, log_w = (into_chunks(x, chunk) for x in (r, k, v, log_w))
    runs = None if runs_BT is None else ChunkRuns(runs_BT, chunk)
    scores, before, after, whole = halved(r, k, log_w, bonus_HN)
    reads = r * before.exp()
    writes = k * after.exp()
    keeps = whole.exp().transpose(-1, -2)
    if runs is not None:
        scores = scores * runs.pairs
        reads = reads * runs.began
        writes = writes * runs.lasts
        keeps = keeps * runs.through
    written = writes.transpose(-1, -2) @ v
    states = []
    for keep, new in zip(keeps.unbind(2), written.unbind(2), strict=True):
        states.append(state_BHNN)
        state_BHNN = keep * state_BHNN + new
    out = scores @ v + reads @ torch.stack(states, 2)
    return out_of_chunks(out, T), state_BHNN


def halved(
    r: Tensor, k: Tensor, log_w: Tensor, bonus_HN: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of the pairs of tokens in each chunk, and sums of log decays.

    Shapes  r, k, log_w (B, H, n, L, N) -> scores (B, H, n, L, L), rows read columns; the sums
            before each token and after it in its chunk (B, H, n, L, N); of all (B, H, n, 1, N).
    """
    # Blocks of one token: what it reads of itself, and nothing before or after it.
    scores = (r * bonus_HN[:, None, None] * k).sum(-1)[..., None, None]
    before = torch.zeros_like(log_w)[..., None, :]
    after = before
    whole = log_w[..., None, :]
    r = r[..., None, :]
    k = k[..., None, :]
    while r.shape[-3] > 1:
        earlier = slice(0, None, 2)
        later = slice(1, None, 2)
        # Two neighbours become one block; dim -3 counts the blocks.
        reads = r[..., later, :, :] * before[..., later, :, :].exp()
        writes = k[..., earlier, :, :] * after[..., earlier, :, :].exp()
        across = reads @ writes.transpose(-1, -2)
        m = across.shape[-1]
        top = F.pad(scores[..., earlier, :, :], (0, m))
        scores = torch.cat([top, torch.cat([across, scores[..., later, :, :]], -1)], -2)
        of_earlier = whole[..., earlier, :, :]
        of_later = whole[..., later, :, :]
        before = torch.cat([before[..., earlier, :, :], before[..., later, :, :] + of_earlier], -2)
        after = torch.cat([after[..., earlier, :, :] + of_later, after[..., later, :, :]], -2)
        whole = of_earlier + of_later
        r = r.unflatten(-3, (-1, 2)).flatten(-3, -2)
        k = k.unflatten(-3, (-1, 2)).flatten(-3, -2)
    return scores.squeeze(-3), before.squeeze(-3), after.squeeze(-3), whole.squeeze(-3)
