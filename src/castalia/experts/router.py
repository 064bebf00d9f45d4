"""The router: scores of the experts for each token, and the weights of those that were chosen.

Shapes: B rows, T tokens held here, C width, E experts, K experts that a token uses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.experts.config import MoeConfig
from castalia.experts.local import local_part


class Router(nn.Module):
    """A matrix, and with loss-free balancing a bias of each expert that decides the choice alone.

    Everything is computed in fp32, whatever the precision of the run.
    """

    def __init__(self, config: MoeConfig, width: int, factor: float = 1.0) -> None:
        """`factor` multiplies the outputs, as of a head under μP."""
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        self.bias: nn.Parameter | None = None
        if config.bias_rate > 0:
            # The trainer moves it against the load; a gradient does not.
            self.bias = nn.Parameter(torch.empty(config.experts), requires_grad=False)

    def forward(self, x_BTC: Tensor, jitter_BTC: Tensor | None = None) -> Tensor:
        """Router outputs, (B, T, C) -> (B, T, E) float32.

        jitter  factors of the input.
        """
        with torch.autocast(x_BTC.device.type, enabled=False):
            x_BTC = x_BTC.float()
            if jitter_BTC is not None:
                x_BTC = x_BTC * jitter_BTC
            logits_BTE = F.linear(x_BTC, local_part(self.weight).float())
            return logits_BTE if self.factor == 1.0 else logits_BTE * self.factor


def scores_of(config: MoeConfig, logits: Tensor) -> Tensor:
    """What weights and choices are made of, (..., E) -> (..., E)."""
    if config.scores == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(-1)


def weights_of(
    config: MoeConfig, scores_BTE: Tensor, chosen_BTK: Tensor, kept_BTK: Tensor | None
) -> Tensor:
    """What the outputs of the chosen experts are multiplied with; 0 where one dropped the token.

    Shapes  (B, T, E), (B, T, K) int64, (B, T, K) bool or None -> (B, T, K).
    """
    weights_BTK = scores_BTE.gather(-1, chosen_BTK)
    if kept_BTK is not None:
        weights_BTK = weights_BTK.masked_fill(~kept_BTK, 0.0)
    if config.normalize:
        # After the drops, as DeepSpeed does: what is left has the sum 1.
        total = weights_BTK.sum(-1, keepdim=True)
        weights_BTK = weights_BTK / total.clamp(min=torch.finfo(total.dtype).eps)
    return weights_BTK if config.scale == 1.0 else weights_BTK * config.scale
