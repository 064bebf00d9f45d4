"""`CausalConvolution`: each channel alone, over the last few tokens, and SiLU of it.

Shapes: B batch, T tokens, E channels, K tokens that an output sees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.held import held


class CausalConvolution(nn.Module):
    """silu(bias + sum over k of weight_k x_{t - K + 1 + k}), within a document."""

    split_axes = {"weight": ("outputs", "tokens"), "bias": ("outputs",)}

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x_BTE: Tensor, segments: Tensor | None = None, past: Tensor | None = None
    ) -> Tensor:
        """(B, T, E) -> (B, T, E), the channels held here.

        segments  (B, T): an output sees tokens of its own segment only; None is one document.
        past      (B, K - 1, E), the tokens before; None means that there were none.
        """
        weight = held(self.weight).to(x_BTE.dtype)
        bias = None if self.bias is None else held(self.bias).to(x_BTE.dtype)
        if past is None:
            y_BTE: Tensor = silu_of_window(x_BTE, weight, bias, segments)
            return y_BTE
        whole = torch.cat([past.to(x_BTE.dtype), x_BTE], 1)
        return F.silu(window_sums(whole, weight, bias, None))[:, self.size - 1 :]

    def step(self, x_BTE: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One token (B, 1, E) behind those in `past` -> its output (B, 1, E), and what
        `remembered` would say."""
        whole = torch.cat([past.to(x_BTE.dtype), x_BTE], 1)
        y_BTE = (whole * held(self.weight).to(x_BTE.dtype).T).sum(1, keepdim=True)
        if self.bias is not None:
            y_BTE = y_BTE + held(self.bias).to(x_BTE.dtype)
        return F.silu(y_BTE), whole[:, 1:]

    def continued(self, x_BTE: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of tokens behind those in `past`, and what is remembered of all."""
        if x_BTE.shape[1] == 1:
            return self.step(x_BTE, past)
        return self(x_BTE, None, past), self.remembered(x_BTE, past)

    def remembered(self, x_BTE: Tensor, past: Tensor) -> Tensor:
        """The last K - 1 tokens, (B, K - 1, E), of those in `past` and (B, T, E) behind them."""
        whole = torch.cat([past.to(x_BTE.dtype), x_BTE], 1)
        # A copy: a view would keep all tokens of a prompt.
        return whole[:, whole.shape[1] - self.size + 1 :].clone()


def window_sums(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None) -> Tensor:
    """The convolution alone, (B, T, E) -> (B, T, E)."""
    # Sums of shifted copies: channels stay the last dim, as the matrices before and after want
    # them, and documents end with a mask of each copy.
    size = weight.shape[1]
    y = x * weight[:, -1]
    if bias is not None:
        y += bias
    for back in range(1, min(size, x.shape[1])):
        part = x[:, :-back]
        if segments is not None:
            part = part * same_segment(segments, back)
        y[:, back:].addcmul_(part, weight[:, size - 1 - back])
    return y


def same_segment(segments: Tensor, back: int) -> Tensor:
    """Whether each token from `back` on and the one `back` before are of one segment, (B, ., 1)."""
    return (segments[:, back:] == segments[:, :-back])[..., None]


# An operator of its own keeps its input alone, where autograd keeps every shifted product.
@torch.library.custom_op("castalia::silu_of_window", mutates_args=())
def silu_of_window(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None
) -> Tensor:
    """SiLU of the convolution: x (B, T, E), weight (E, K), bias (E,), segments (B, T)."""
    # In the layout that a compiled graph is told of, whatever that of x.
    return F.silu(window_sums(x.contiguous(), weight, bias, segments), inplace=True)


@silu_of_window.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("castalia::silu_of_window_backward", mutates_args=())
def window_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty without one)."""
    size = weight.shape[1]
    x = x.contiguous()
    dy = dy.contiguous()
    d_sums = torch.ops.aten.silu_backward(dy, window_sums(x, weight, bias, segments))
    dx = d_sums * weight[:, -1]
    columns = [channel_sums(d_sums * x)]
    for back in range(1, size):
        if back >= x.shape[1]:
            columns.append(torch.zeros_like(columns[0]))
            continue
        part = d_sums[:, back:]
        if segments is not None:
            part = part * same_segment(segments, back)
        dx[:, :-back].addcmul_(part, weight[:, size - 1 - back])
        columns.append(channel_sums(part * x[:, :-back]))
    d_weight = torch.stack(columns[::-1], 1)
    d_bias = x.new_empty(0) if bias is None else channel_sums(d_sums)
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def channel_sums(products: Tensor) -> Tensor:
    """(B, T, E) -> (E,), in fp32 at least."""
    dtype = torch.float32 if products.dtype.itemsize < 4 else products.dtype
    return products.sum((0, 1), dtype=dtype)


@window_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs; the sums are computed again."""
    ctx.save_for_backward(*inputs)


def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs."""
    x, weight, bias, segments = ctx.saved_tensors
    dx, d_weight, d_bias = window_backward(dy, x, weight, bias, segments)
    return dx, d_weight, None if bias is None else d_bias, None


silu_of_window.register_autograd(differentiate, setup_context=remember)


def document_starts(segments: Tensor | None) -> Tensor | None:
    """Where a document begins behind another one, bool (B, T); None if no row has two."""
    if segments is None:
        return None
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
