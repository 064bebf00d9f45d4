"""The two mixers of RWKV 7, of time and of channels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.options import Rwkv7Options
from castalia.recurrent.rwkv6 import HeadwiseNorm, empty_state, matrix, vector
from castalia.recurrent.token_shift import Kept, in_fp32, token_before, wide
from castalia.recurrent.wkv7 import wkv7, wkv7_by_token, wkv7_step

NORM_EPSILON = 64e-5
"""Epsilon of the norm over each head."""
SLOWEST = math.exp(-0.5)
"""No decay is stronger than exp(-exp(-0.5)) = 0.545 a token."""


class TimeMix7(nn.Module):
    """In place of attention: a state that is corrected by each token, as by a step of gradient
    descent.

    first  whether it is the model's first: it makes the values that the others mix with theirs.
    Source  Peng et al. 2025, arXiv:2503.14456, section 4.1.
    """

    def __init__(self, width: int, options: Rwkv7Options, first: bool) -> None:
        super().__init__()
        self.head_size = options.head_size
        self.first = first
        ranks = options.ranks(width)
        self.mix_r = vector(width)
        self.mix_w = vector(width)
        self.mix_k = vector(width)
        self.mix_v = vector(width)
        self.mix_a = vector(width)
        self.mix_g = vector(width)
        self.decay = vector(width)
        self.decay_in = matrix(width, ranks.decay)
        self.decay_out = matrix(ranks.decay, width)
        self.rate = vector(width)
        self.rate_in = matrix(width, ranks.rate)
        self.rate_out = matrix(ranks.rate, width)
        if not first:
            self.value_mix = vector(width)
            self.value_in = matrix(width, ranks.value)
            self.value_out = matrix(ranks.value, width)
        self.gate_in = matrix(width, ranks.gate)
        self.gate_out = matrix(ranks.gate, width)
        self.key_scale = vector(width)
        self.key_rate = vector(width)
        self.bonus = matrix(width // options.head_size, options.head_size)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = HeadwiseNorm(width, options.head_size, NORM_EPSILON)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        values_BTC: Tensor | None,
        runs_BT: Tensor | None,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> what is added to the stream and the values of the first layer, (B, T, C).

        values_BTC  those of the first layer; None in the first itself.
        kept        is empty of tokens or goes on after its last one.
        """
        past_BTC = token_before(x_BTC, runs_BT, kept, "time_shift") - x_BTC
        of_values = x_BTC + past_BTC * self.mix_v
        r = self.receptance(x_BTC + past_BTC * self.mix_r)
        k = self.key(x_BTC + past_BTC * self.mix_k)
        v = self.value(of_values)
        slowed = torch.tanh((x_BTC + past_BTC * self.mix_w) @ self.decay_in) @ self.decay_out
        rate = (x_BTC + past_BTC * self.mix_a) @ self.rate_in @ self.rate_out
        gate = torch.sigmoid((x_BTC + past_BTC * self.mix_g) @ self.gate_in) @ self.gate_out
        if self.first:
            values_BTC = v
        else:
            assert values_BTC is not None, "the first layer of RWKV 7 hands on its values"
            share = torch.sigmoid(self.value_mix + of_values @ self.value_in @ self.value_out)
            v = v + (values_BTC - v) * share
        out = self.recur(r, k, v, slowed, rate, runs_BT, kept)
        mixed_BTC: Tensor = self.output(out.to(gate.dtype) * gate)
        return mixed_BTC, values_BTC

    def recur(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        slowed: Tensor,
        rate: Tensor,
        runs_BT: Tensor | None,
        kept: Kept | None,
    ) -> Tensor:
        """Receptance, keys, values, the changes of decays and of rates, (B, T, C) -> (B, T, C), all
        computed in fp32."""
        with in_fp32(r):
            log_w = -SLOWEST * torch.sigmoid(wide(self.decay) + wide(slowed))
            rate = torch.sigmoid(wide(self.rate) + wide(rate))
            removed = wide(k) * wide(self.key_scale)
            k = wide(k) * (1 + (rate - 1) * wide(self.key_rate))
            heads = (r, log_w, k, v, removed, rate)
            r, log_w, k, v, removed, rate = (
                wide(x).unflatten(-1, (-1, self.head_size)) for x in heads
            )
            removed = F.normalize(removed, dim=-1)
            if kept is None:
                state = empty_state(r)
            else:
                state = kept["wkv"]
            out, state = recurred(r, log_w, k, v, -removed, removed * rate, state, runs_BT)
            if kept is not None:
                kept["wkv"] = state
            own = (r * k * wide(self.bonus)).sum(-1, keepdim=True) * v
            normed: Tensor = self.norm(out) + own.flatten(-2)
        return normed


def recurred(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state_BHNN: Tensor,
    runs_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in the form that its number of tokens asks for; shapes as `wkv7`."""
    if r.shape[1] == 1:
        r, log_w, k, v, a, b = (x[:, 0] for x in (r, log_w, k, v, a, b))
        out_BHN, state_BHNN = wkv7_step(r, log_w, k, v, a, b, state_BHNN)
        return out_BHN[:, None], state_BHNN
    # Two tokens are not worth a chunk.
    form = wkv7_by_token if r.shape[1] == 2 else wkv7
    return form(r, log_w, k, v, a, b, state_BHNN, runs_BT)


class ChannelMix7(nn.Module):
    """In place of an MLP: relu squared. Source  the same paper, section 4.2."""

    def __init__(self, width: int, options: Rwkv7Options) -> None:
        super().__init__()
        inner = options.ffn(width)
        self.mix_k = vector(width)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTC: Tensor, runs_BT: Tensor | None, kept: Kept | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        past_BTC = token_before(x_BTC, runs_BT, kept, "channel_shift") - x_BTC
        inner = F.relu(self.key(x_BTC + past_BTC * self.mix_k)).square()
        out_BTC: Tensor = self.value(inner)
        return out_BTC
