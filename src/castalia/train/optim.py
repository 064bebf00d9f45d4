"""AdamW with GPT-NeoX's decay groups, its clip formula, and optimizer state as named tensors."""

import torch
from torch import Tensor, nn

from castalia.train.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str, module: nn.Module) -> bool:
    """Whether weight decay applies: everything but biases and the parameters of norms (GPT-NeoX model/utils.py)."""
    return not isinstance(module, nn.LayerNorm | nn.RMSNorm) and name != "bias"


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups, with and without decay, each in the order of the model; a tied weight counts once."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                groups[decays(name, module)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW whose state exists from the start, so that loading fills it in place.

    Source  p -= lr * (m' / (sqrt(v') + eps) + wd * p), bias-corrected; Loshchilov and Hutter, arXiv:1711.05101.
    """
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optim.exp_avg.<parameter>` and `optim.exp_avg_sq.<parameter>`: the live tensors, to save or to fill."""
    return {
        f"optim.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
    }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set Adam's step count, which its bias correction uses."""
    for state in optimizer.state.values():
        state["step"].fill_(float(updates))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr
