"""`Mamba2Mixer`: the mixer of Mamba 2, of which each rank of tensor parallelism has some heads.

Shapes: B batch, T tokens, C width, E channels held here, G groups of R heads held here, P channels
of a head, N numbers that a channel remembers.

Source  Dao and Gu 2024, arXiv:2405.21060, section 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.convolution import CausalConvolution, document_starts
from castalia.recurrent.dual_scan import dual_scan, dual_step
from castalia.recurrent.gated_norm import GatedNorm
from castalia.recurrent.held import ALL, ChannelShare, held, narrowed
from castalia.recurrent.options import Mamba2Options


class HeadDecays(nn.Module):
    """Decay, skip and bias of the time step of each head, always used in fp32."""

    split_axes = {"A_log": ("outputs",), "D": ("outputs",), "dt_bias": ("outputs",)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))


class Mamba2Mixer(nn.Module):
    """x, gate, time steps, what writes and what reads, all from the token; then a scan of x."""

    def __init__(self, width: int, options: Mamba2Options, eps: float) -> None:
        super().__init__()
        inner = options.channels(width)
        heads = options.heads(width)
        both = options.groups * options.state_size
        self.options = options
        # Matrices of their own where others have one: each rank holds its heads of all.
        self.x = nn.Linear(width, inner, bias=options.bias)
        self.z = nn.Linear(width, inner, bias=options.bias)
        self.B = nn.Linear(width, both, bias=options.bias)
        self.C = nn.Linear(width, both, bias=options.bias)
        self.dt = nn.Linear(width, heads, bias=options.bias)
        self.conv_x = CausalConvolution(inner, options.conv_size, options.conv_bias)
        self.conv_B = CausalConvolution(both, options.conv_size, options.conv_bias)
        self.conv_C = CausalConvolution(both, options.conv_size, options.conv_bias)
        self.ssm = HeadDecays(heads)
        self.norm = GatedNorm(inner, options.groups, eps)
        self.out = nn.Linear(inner, width, bias=options.bias)

    @property
    def tp_plan(self) -> dict[str, str]:
        """Heads are split; groups too, unless there are fewer than ranks."""
        groups = self.options.groups
        columns = dict.fromkeys(("x", "z", "dt"), "columns")
        own = dict.fromkeys(("conv_x", "ssm", "norm"), "outputs")
        shared = dict.fromkeys(("B", "C"), f"heads:{groups}")
        shared |= dict.fromkeys(("conv_B", "conv_C"), f"groups:{groups}")
        return columns | own | shared | {"out": "row"}

    def forward(
        self,
        x_BTC: Tensor,
        segments: Tensor | None = None,
        kept: dict[str, Tensor] | None = None,
        share: ChannelShare = ALL,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the arguments are those of `MambaMixer`."""
        x_BTC = narrowed(x_BTC)
        z_BTE = self.z(x_BTC)
        mixed = {
            name: self.convolved(name, getattr(self, name)(x_BTC), segments, kept)
            for name in ("x", "B", "C")
        }
        here = share.of(self.options.groups)
        B_BTGN, C_BTGN = (self.own_groups(mixed[name], here) for name in ("B", "C"))
        groups = here.stop - here.start
        x_BTGRP = mixed["x"].unflatten(-1, (groups, -1, self.options.head_size))
        # In fp32: the decay is the exponential of a sum of these over many tokens.
        dt_BTH = F.softplus(self.dt(x_BTC).float() + held(self.ssm.dt_bias).float())
        if self.options.dt_limit is not None:
            dt_BTH = dt_BTH.clamp(*self.options.dt_limit)
        dt_BTGR = dt_BTH.unflatten(-1, (groups, -1))
        A_GR = -torch.exp(held(self.ssm.A_log).float()).view(groups, -1)
        y_BTGRP = self.scanned(x_BTGRP, dt_BTGR, A_GR, B_BTGN, C_BTGN, segments, kept)
        D_GR1 = held(self.ssm.D).float().view(groups, -1, 1)
        y_BTE = torch.addcmul(y_BTGRP, x_BTGRP, D_GR1).flatten(-3)
        out_BTC: Tensor = self.out(self.norm(y_BTE, z_BTE, share))
        return out_BTC

    def convolved(
        self, name: str, x: Tensor, segments: Tensor | None, kept: dict[str, Tensor] | None
    ) -> Tensor:
        """The convolution of x, B or C, and its function."""
        conv: CausalConvolution = getattr(self, f"conv_{name}")
        if kept is None:
            return conv(x, segments)
        mixed, kept[f"conv_{name}"] = conv.continued(x, kept[f"conv_{name}"])
        return mixed

    def own_groups(self, x: Tensor, here: slice) -> Tensor:
        """B or C by group, (B, T, G, N), of the heads held here."""
        by_group: Tensor = x.unflatten(-1, (-1, self.options.state_size))
        if by_group.shape[2] == here.stop - here.start:
            return by_group
        # Fewer groups than ranks: each rank made all of them.
        return by_group[:, :, here]

    def scanned(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        segments: Tensor | None,
        kept: dict[str, Tensor] | None,
    ) -> Tensor:
        """The scan; one token by the step."""
        if kept is not None and x.shape[1] == 1:
            first = (each[:, 0].float() for each in (B, C))
            B_SGN, C_SGN = first
            y, kept["ssm"] = dual_step(x[:, 0].float(), dt[:, 0], A, B_SGN, C_SGN, kept["ssm"])
            return y[:, None]
        chunk = self.options.chunk_size
        if x.device.type == "cpu":
            chunk = min(chunk, Mamba2Options.CPU_CHUNK)
        starts = document_starts(segments)
        h = None if kept is None else kept["ssm"]
        y, last = dual_scan(x, dt, A, B, C, starts, h, chunk)
        if kept is not None:
            kept["ssm"] = last
        return y

    def remembered(
        self, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The state before the first token."""
        state: dict[str, Tensor] = {}
        for name in ("conv_x", "conv_B", "conv_C"):
            conv: CausalConvolution = getattr(self, name)
            channels = len(held(conv.weight))
            state[name] = torch.zeros(batch, conv.size - 1, channels, dtype=dtype, device=device)
        heads = len(held(self.ssm.A_log))
        groups = min(self.options.groups, heads)
        shape = (batch, groups, heads // groups, self.options.head_size, self.options.state_size)
        # Always fp32: a state is a sum over all tokens.
        return state | {"ssm": torch.zeros(shape, device=device)}
