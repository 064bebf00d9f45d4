"""AdamW, the default optimizer."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat

from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS, OptimConfig
from castalia.optim.widths import ADAM_LIKE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class AdamWConfig(OptimConfig):
    """AdamW: Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    """Name of the optimizer."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


@OPTIMIZERS.register("adamw")
class AdamW(Member):
    """p -= lr * (m' / (sqrt(v') + eps) + weight_decay * p), with bias-corrected moments m' and v'.

    Source  Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    Config = AdamWConfig
    by_width = ADAM_LIKE

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """The two moments, in fp32 whatever the arithmetic of the passes."""
        return {"exp_avg": StateTensor(), "exp_avg_sq": StateTensor()}

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> "torch.optim.Optimizer":
        """torch's fused AdamW: one kernel for all parameters of a group, on CPUs as well."""
        import torch

        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    @classmethod
    def counters(cls, parameter: "nn.Parameter", updates: int) -> "dict[str, Tensor]":
        """Adam's step count, which bias correction uses; the fused kernel wants it on the
        parameter's device."""
        import torch

        return {"step": torch.full((), float(updates), device=parameter.device)}
