"""The two mixers of RWKV 6, of time and of channels."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.options import MIXES, Rwkv6Options
from castalia.recurrent.token_shift import Kept, in_fp32, token_before, wide
from castalia.recurrent.wkv6 import wkv6, wkv6_by_token, wkv6_step


class TimeMix6(nn.Module):
    """In place of attention: sums of values by keys, with decays that depend on the token.

    Source  Peng et al. 2024, arXiv:2404.05892, section 4.1, with the gate of section 4.2.
    """

    def __init__(self, width: int, options: Rwkv6Options) -> None:
        super().__init__()
        inner = options.inner(width)
        self.head_size = options.head_size
        self.mix_x = vector(width)
        self.mix_w = vector(width)
        self.mix_k = vector(width)
        self.mix_v = vector(width)
        self.mix_r = vector(width)
        self.mix_g = vector(width)
        rank = options.ranks(width).mix
        self.mix_in = matrix(width, MIXES * rank)
        self.mix_out = matrix(MIXES * rank, width)
        self.decay = vector(inner)
        self.decay_in = matrix(width, options.ranks(width).decay)
        self.decay_out = matrix(options.ranks(width).decay, inner)
        self.bonus = matrix(inner // options.head_size, options.head_size)
        self.receptance = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm = HeadwiseNorm(inner, options.head_size, options.head_epsilon)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTC: Tensor, runs_BT: Tensor | None, kept: Kept | None) -> Tensor:
        """(B, T, C) -> (B, T, C); `kept` is empty of tokens or goes on after its last one."""
        past_BTC = token_before(x_BTC, runs_BT, kept, "time_shift") - x_BTC
        w, k, v, r, g = self.mixed(x_BTC, past_BTC)
        slowed = torch.tanh(w @ self.decay_in) @ self.decay_out
        gate = F.silu(self.gate(g))
        out = self.recur(self.receptance(r), self.key(k), self.value(v), slowed, runs_BT, kept)
        mixed_BTC: Tensor = self.output(out.to(gate.dtype) * gate)
        return mixed_BTC

    def mixed(self, x_BTC: Tensor, past_BTC: Tensor) -> Iterable[Tensor]:
        """What decays, keys, values, receptance and gate are made of, each (B, T, C)."""
        ranks_BTR = torch.tanh((x_BTC + past_BTC * self.mix_x) @ self.mix_in)
        ranks = ranks_BTR.unflatten(-1, (MIXES, -1))
        outs = self.mix_out.unflatten(0, (MIXES, -1))
        bases = (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g)
        if x_BTC.shape[1] == 1:
            # Of one token the calls cost more than the numbers, so that all five are made in one.
            shares = torch.baddbmm(torch.stack(bases)[:, None], ranks[:, 0].transpose(0, 1), outs)
            return torch.addcmul(x_BTC[:, 0], past_BTC[:, 0], shares)[:, :, None].unbind(0)
        parts = zip(bases, ranks.unbind(-2), outs.unbind(0), strict=True)
        return [x_BTC + past_BTC * (base + rank @ out) for base, rank, out in parts]

    def recur(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        slowed: Tensor,
        runs_BT: Tensor | None,
        kept: Kept | None,
    ) -> Tensor:
        """Receptance, keys, values and the changes of the decays, (B, T, A) -> (B, T, A), all
        computed in fp32."""
        with in_fp32(r):
            log_w = -torch.exp(wide(self.decay) + wide(slowed))
            heads = (r, k, v, log_w)
            r, k, v, log_w = (wide(x).unflatten(-1, (-1, self.head_size)) for x in heads)
            if kept is None:
                state = empty_state(r)
            else:
                state = kept["wkv"]
            out, state = self.recurred(r, k, v, log_w, state, runs_BT)
            if kept is not None:
                kept["wkv"] = state
            normed: Tensor = self.norm(out)
        return normed

    def recurred(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_w: Tensor,
        state_BHNN: Tensor,
        runs_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence in the form that its number of tokens asks for; shapes as `wkv6`."""
        bonus_HN = wide(self.bonus)
        if r.shape[1] == 1:
            r, k, v, log_w = (x[:, 0] for x in (r, k, v, log_w))
            out_BHN, state_BHNN = wkv6_step(r, k, v, log_w, bonus_HN, state_BHNN)
            return out_BHN[:, None], state_BHNN
        # Two tokens are not worth a chunk.
        form = wkv6_by_token if r.shape[1] == 2 else wkv6
        return form(r, k, v, log_w, bonus_HN, state_BHNN, runs_BT)


class ChannelMix6(nn.Module):
    """In place of an MLP: relu squared, and a gate. Source  the same paper, section 4.3."""

    def __init__(self, width: int, options: Rwkv6Options) -> None:
        super().__init__()
        inner = options.ffn(width)
        self.mix_k = vector(width)
        self.mix_r = vector(width)
        self.key = nn.Linear(width, inner, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTC: Tensor, runs_BT: Tensor | None, kept: Kept | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        past_BTC = token_before(x_BTC, runs_BT, kept, "channel_shift") - x_BTC
        inner = F.relu(self.key(x_BTC + past_BTC * self.mix_k)).square()
        gate = torch.sigmoid(self.receptance(x_BTC + past_BTC * self.mix_r))
        return gate * self.value(inner)


class HeadwiseNorm(nn.Module):
    """LayerNorm of each head, with a weight and a bias for every channel."""

    def __init__(self, width: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.eps = eps
        self.weight = vector(width)
        self.bias = vector(width)

    def forward(self, x_BTHN: Tensor) -> Tensor:
        """(B, T, H, N) in fp32 -> (B, T, H * N)."""
        normed = F.layer_norm(x_BTHN, (self.head_size,), eps=self.eps).flatten(-2)
        return normed * wide(self.weight) + wide(self.bias)


def vector(width: int) -> nn.Parameter:
    """A parameter without values, (width,)."""
    return nn.Parameter(torch.empty(width))


def matrix(rows: int, columns: int) -> nn.Parameter:
    """A parameter without values, (rows, columns)."""
    return nn.Parameter(torch.empty(rows, columns))


def empty_state(x_BTHN: Tensor) -> Tensor:
    """Matrices of zeros, one for each head, (B, H, N, N)."""
    B, _, H, N = x_BTHN.shape
    return x_BTHN.new_zeros(B, H, N, N)
