"""Adam with coupled weight decay."""

from typing import TYPE_CHECKING, Any, Literal

from castalia.optim.adamw import AdamW, AdamWConfig
from castalia.optim.config import OPTIMIZERS

if TYPE_CHECKING:
    import torch


class AdamConfig(AdamWConfig):
    """Adam with the decay in the gradient: AdamW decouples it, which is what most runs want."""

    kind: Literal["adam"] = "adam"  # type: ignore[assignment]
    """Name of the optimizer."""


@OPTIMIZERS.register("adam")
class Adam(AdamW):
    """p -= lr * m' / (sqrt(v') + eps), with bias-corrected moments of g + weight_decay * p.

    Source  Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
    """

    Config = AdamConfig

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """torch's fused Adam."""
        import torch

        return torch.optim.Adam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
