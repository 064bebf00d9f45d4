"""`CausalConvolution`: each channel alone, over the last few tokens.

Shapes: B batch, T tokens, E channels, K tokens that an output sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.recurrent.held import held


class CausalConvolution(nn.Module):
    """y_t = bias + sum over k of weight_k x_{t - K + 1 + k}, within a document."""

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
        T = x_BTE.shape[1]
        if past is not None:
            x_BTE = torch.cat([past.to(x_BTE.dtype), x_BTE], 1)
        else:
            x_BTE = F.pad(x_BTE, (0, 0, self.size - 1, 0))
        last = self.size - 1
        # Sums of shifted copies: channels stay the last dim, as the matrices before and after want
        # them, and documents end with a mask of each copy.
        y_BTE = x_BTE[:, last:] * weight[:, last]
        if bias is not None:
            y_BTE = y_BTE + bias
        for back in range(1, self.size):
            part = x_BTE[:, last - back : last - back + T]
            if segments is not None:
                part = part * same_segment(segments, back)[..., None]
            y_BTE = torch.addcmul(y_BTE, part, weight[:, last - back])
        return y_BTE

    def remembered(self, x_BTE: Tensor, past: Tensor) -> Tensor:
        """The last K - 1 tokens, (B, K - 1, E), of those in `past` and (B, T, E) behind them."""
        whole = torch.cat([past.to(x_BTE.dtype), x_BTE], 1)
        # A copy: a view would keep all tokens of a prompt.
        return whole[:, whole.shape[1] - self.size + 1 :].clone()


def same_segment(segments: Tensor, back: int) -> Tensor:
    """Whether each token and the one `back` before it are of one segment, bool (B, T)."""
    same = segments[:, back:] == segments[:, :-back]
    return F.pad(same, (min(back, segments.shape[1]), 0))


def document_starts(segments: Tensor | None) -> Tensor | None:
    """Where a document begins behind another one, bool (B, T); None if no row has two."""
    if segments is None:
        return None
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
