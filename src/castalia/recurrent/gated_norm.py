"""`GatedNorm`: the norm of Mamba 2 over each group of channels, after the gate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.held import ChannelShare, held


class GatedNorm(nn.Module):
    """RMSNorm of y silu(z) over each group of channels."""

    split_axes = {"weight": ("outputs",)}

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, y_BTE: Tensor, z_BTE: Tensor, share: ChannelShare) -> Tensor:
        """(B, T, E) -> the same shape, in the dtype of z."""
        weight = held(self.weight).float()
        if self.groups < share.size:
            return self.of_shared_groups(y_BTE, z_BTE, weight, share)
        here = share.of(self.groups)
        # Calling an operator written in Python costs more than the norm of a token.
        norm = gated_norm if torch.is_grad_enabled() else normed_groups
        normed: Tensor = norm(y_BTE, z_BTE, weight, here.stop - here.start, self.eps)
        return normed

    def of_shared_groups(
        self, y_BTE: Tensor, z_BTE: Tensor, weight: Tensor, share: ChannelShare
    ) -> Tensor:
        """The same where ranks hold a part of a group each, whose squares are summed over them."""
        gated = y_BTE.float() * F.silu(z_BTE.float())
        here = share.of(self.groups)
        squares = gated.square().sum(-1, keepdim=True)
        # The ranks of other groups add zeros.
        own = F.pad(squares, (here.start, self.groups - here.stop))
        mean = share.total(own)[..., here] * (self.groups / self.channels)
        return (gated * torch.rsqrt(mean + self.eps) * weight).to(z_BTE.dtype)


def normed_groups(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y, z (B, T, E), weight (E,) fp32 -> (B, T, E) in the dtype of z."""
    # In the layout that a compiled graph is told of, whatever that of y and z.
    gated = F.silu(z.to(y.dtype).contiguous()).mul_(y)
    parts = gated.unflatten(-1, (groups, -1))
    parts *= inverse_size(parts, eps)
    return gated.mul_(weight).to(z.dtype)


# An operator of its own keeps y and z alone, where autograd keeps every product.
@torch.library.custom_op("castalia::gated_norm", mutates_args=())
def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`normed_groups`, differentiable."""
    return normed_groups(y, z, weight, groups, eps)


def inverse_size(parts: Tensor, eps: float) -> Tensor:
    """1 over the root mean square of each group, (..., G, E / G) -> (..., G, 1)."""
    # The norm's own kernel squares and adds up without a tensor of the squares.
    size: Tensor = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
    return size.square_().div_(parts.shape[-1]).add_(eps).rsqrt_()


@gated_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.custom_op("castalia::gated_norm_backward", mutates_args=())
def norm_backward(
    d_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    y = y.contiguous()
    z = z.contiguous()
    gate = F.silu(z.to(y.dtype))
    gated = (gate * y).unflatten(-1, (groups, -1))
    inverse = inverse_size(gated, eps)
    normed = gated.mul_(inverse)
    wide = d_out.to(y.dtype).contiguous()
    d_weight = (wide * normed.flatten(-2)).flatten(0, -2).sum(0)
    d_normed = (wide * weight).unflatten(-1, (groups, -1))
    # The part along the normed vector changes its length alone, which the norm takes out.
    along = (d_normed * normed).mean(-1, keepdim=True)
    d_gated = d_normed.addcmul_(normed, along, value=-1).mul_(inverse).flatten(-2)
    dz = torch.ops.aten.silu_backward(d_gated * y, z.to(y.dtype))
    return d_gated * gate, dz.to(z.dtype), d_weight


@norm_backward.register_fake
def _(
    d_out: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep y, z and the weight."""
    y, z, weight, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(y, z, weight)


def differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y, z and weight."""
    y, z, weight = ctx.saved_tensors
    return *norm_backward(d_out, y, z, weight, ctx.groups, ctx.eps), None, None


gated_norm.register_autograd(differentiate, setup_context=remember)
