"""Norms of the residual stream, and of queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from castalia.models.config import TransformerConfig
from castalia.models.context import HeadShare
from castalia.models.model_config import BlocksConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose weights may be narrower than its input, as bf16 weights of an fp32 stream."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        weight = widened(self.weight, input)
        bias = widened(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weights may be narrower than its input, as bf16 weights of an fp32 stream."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.rms_norm(x, self.normalized_shape, widened(self.weight, x), self.eps)


def widened(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's parameter in fp32 where its input is; torch's kernels want no narrower one."""
    if parameter is None or x.dtype != torch.float32:
        return parameter
    return parameter.float()


class PartialRMSNorm(nn.Module):
    """RMSNorm whose mean square is that of the first `share` of the dimensions.

    Source  Zhang and Sennrich 2019, arXiv:1910.07467, section 4.1 (pRMSNorm).
    """

    def __init__(self, width: int, share: float, eps: float) -> None:
        super().__init__()
        self.read = max(1, int(width * share))
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = x.float()
        mean = wide[..., : self.read].square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight


class ScaleNorm(nn.Module):
    """x / max(|x|, eps), times one learned number.

    Source  Nguyen and Salazar 2019, arXiv:1910.05895, equation 5.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        length = x.float().square().sum(-1, keepdim=True).sqrt().clamp(min=self.eps)
        return (x / length).to(x.dtype) * self.weight


def make_norm(config: BlocksConfig) -> nn.Module:
    """The norm of the residual stream that the config asks for."""
    width = config.hidden_size
    eps = config.layernorm_epsilon
    if config.norm == "rmsnorm" and config.rmsnorm_partial is not None:
        return PartialRMSNorm(width, config.rmsnorm_partial, eps)
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=eps)
    if config.norm == "scalenorm":
        return ScaleNorm(eps)
    affine = config.norm == "layernorm"
    return LayerNorm(width, eps=eps, elementwise_affine=affine)


class HeadNorm(nn.Module):
    """Norm of queries or keys.

    across     mean and square are those of all heads together, not of each head.
    by_head    the weight has a number for each dimension of every head, not one for all heads.
    centred    as LayerNorm; otherwise as RMSNorm.
    Under tensor parallelism each rank holds some of the heads; what is taken across them is summed
    over the ranks.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        across: bool,
        by_head: bool,
        centred: bool,
        affine: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.across = across
        self.by_head = by_head
        self.centred = centred
        self.eps = eps
        width = heads * head_dim if by_head else head_dim
        self.weight = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine and centred else None

    def forward(self, x_BTHD: Tensor, share: HeadShare) -> Tensor:
        """(B, T, H, D) -> the same shape and dtype, H the heads held here."""
        x = x_BTHD.float()
        if self.across:
            y = self.over_all_heads(x, share)
        elif self.centred:
            y = F.layer_norm(x, (self.head_dim,), eps=self.eps)
        else:
            y = F.rms_norm(x, (self.head_dim,), eps=self.eps)
        y = y.to(x_BTHD.dtype)
        if self.weight is not None:
            y = y * self.own(self.weight, share, y.shape[-2])
        if self.bias is not None:
            y = y + self.own(self.bias, share, y.shape[-2])
        # fp32 weights widen a bf16 activation, and attention takes q, k and v of one dtype.
        return y.to(x_BTHD.dtype)

    def over_all_heads(self, x: Tensor, share: HeadShare) -> Tensor:
        """x less its mean (`centred`), over its root mean square; both over all heads."""
        held = x.shape[-2]
        # Where ranks share the key heads, each head is on several of them and counts once.
        copies = share.size * held / self.heads
        count = self.heads * self.head_dim * copies
        if self.centred:
            x = x - share.total(x.sum((-2, -1), keepdim=True)) / count
        square = share.total(x.square().sum((-2, -1), keepdim=True)) / count
        return x * torch.rsqrt(square + self.eps)

    def own(self, parameter: Tensor, share: HeadShare, held: int) -> Tensor:
        """The part of a parameter that belongs to the heads held here, (D,) or (held, D)."""
        whole = local(parameter)
        if not self.by_head:
            return whole
        by_head: Tensor = whole.unflatten(0, (self.heads, self.head_dim))
        return by_head if held == self.heads else by_head[share.of(self.heads)]


def local(parameter: Tensor) -> Tensor:
    """A parameter that every rank of tensor parallelism holds and uses for its own heads."""
    if isinstance(parameter, DTensor):
        # Each rank's gradient is that of its own heads; their sum is the parameter's.
        return parameter.to_local(grad_placements=[Partial()])
    return parameter


def make_head_norm(config: TransformerConfig, heads: int) -> HeadNorm | None:
    """The norm of queries or keys of `heads` heads; None if the config asks for none."""
    if config.qk_norm == "none":
        return None
    centred = config.norm != "rmsnorm"
    # GPT-NeoX gives its norm the shape (heads, head_dim), of which torch's LayerNorm takes both
    # dimensions together and its own RMSNorm the last alone.
    across = config.qk_norm == "width" or (config.qk_norm == "neox" and centred)
    return HeadNorm(
        heads,
        config.head_dim,
        across=across,
        by_head=config.qk_norm != "head",
        centred=centred,
        affine=config.norm != "non_parametric_layernorm",
        eps=config.layernorm_epsilon,
    )
