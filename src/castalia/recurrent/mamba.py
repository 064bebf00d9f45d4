"""`MambaMixer`: the mixer of Mamba, of which each rank of tensor parallelism has some channels.

Shapes: B batch, T tokens, C width, E channels held here, N numbers that a channel remembers.

Source  Gu and Dao 2023, arXiv:2312.00752, section 3.4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.convolution import CausalConvolution, document_starts
from castalia.recurrent.held import ALL, BareMatrix, ChannelShare, held, narrowed
from castalia.recurrent.options import MambaOptions
from castalia.recurrent.selective_scan import scan_step, selective_scan


class DiagonalState(nn.Module):
    """Decays and skip of the channels, always used in fp32."""

    split_axes = {"A_log": ("outputs", "state"), "D": ("outputs",)}

    def __init__(self, channels: int, state: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, state))
        self.D = nn.Parameter(torch.empty(channels))


class MambaMixer(nn.Module):
    """x and z from the token; a short convolution and a selective scan of x; z is the gate."""

    tp_plan = {
        "x": "columns",
        "z": "columns",
        "conv": "outputs",
        "x_proj": "inputs",
        "dt_proj": "outputs",
        "ssm": "outputs",
        "out": "row",
    }

    def __init__(self, width: int, options: MambaOptions) -> None:
        super().__init__()
        inner = options.channels(width)
        self.rank = options.rank(width)
        self.state = options.state_size
        # Two matrices where others have one: each rank then holds the same channels of both.
        self.x = nn.Linear(width, inner, bias=options.bias)
        self.z = nn.Linear(width, inner, bias=options.bias)
        self.conv = CausalConvolution(inner, options.conv_size, options.conv_bias)
        self.x_proj = BareMatrix(inner, self.rank + 2 * self.state, bias=False)
        self.dt_proj = BareMatrix(self.rank, inner, bias=True)
        self.ssm = DiagonalState(inner, self.state)
        self.out = nn.Linear(inner, width, bias=options.bias)

    def forward(
        self,
        x_BTC: Tensor,
        segments: Tensor | None = None,
        kept: dict[str, Tensor] | None = None,
        share: ChannelShare = ALL,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        segments  (B, T): document of each token; convolution and state begin anew with each.
        kept      what `remembered` made; the state of the tokens is written into it.
        share     the channels held here.
        """
        x_BTC = narrowed(x_BTC)
        x_BTE = self.x(x_BTC)
        z_BTE = self.z(x_BTC)
        if kept is None:
            u_BTE = self.conv(x_BTE, segments)
        else:
            u_BTE, kept["conv"] = self.conv.continued(x_BTE, kept["conv"])
        dt_BTE, B_BTN, C_BTN = self.selected(u_BTE, share)
        A_EN = -torch.exp(held(self.ssm.A_log).float())
        if kept is None:
            starts = document_starts(segments)
            y_BTE, _ = selective_scan(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, starts)
        else:
            y_BTE, kept["ssm"] = continued(u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, kept["ssm"])
        y_BTE = torch.addcmul(y_BTE, u_BTE, held(self.ssm.D).float())
        out_BTC: Tensor = self.out(y_BTE.to(z_BTE.dtype) * F.silu(z_BTE))
        return out_BTC

    def selected(self, u_BTE: Tensor, share: ChannelShare) -> tuple[Tensor, Tensor, Tensor]:
        """Time steps (B, T, E) in fp32, and what writes to the state and reads it, (B, T, N)."""
        # Each rank's channels give an addend of all three.
        both = share.total(F.linear(u_BTE, held(self.x_proj.weight)))
        low_BTR, B_BTN, C_BTN = both.split([self.rank, self.state, self.state], -1)
        dt_BTE = F.linear(low_BTR, held(self.dt_proj.weight))
        # In fp32: the decay is the exponential of a sum of these over many tokens.
        return F.softplus(dt_BTE.float() + held(self.dt_proj.bias).float()), B_BTN, C_BTN

    def remembered(
        self, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The state before the first token."""
        E, N = held(self.ssm.A_log).shape
        conv = torch.zeros(batch, self.conv.size - 1, E, dtype=dtype, device=device)
        # Always fp32: a state is a sum over all tokens.
        return {"conv": conv, "ssm": torch.zeros(batch, E, N, device=device)}


def continued(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` from a state, by the step if there is one token."""
    if u.shape[1] > 1:
        return selective_scan(u, dt, A, B, C, h=h)
    y, h = scan_step(u[:, 0].float(), dt[:, 0], A, B[:, 0].float(), C[:, 0].float(), h)
    return y[:, None], h
