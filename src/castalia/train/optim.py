"""AdamW with GPT-NeoX's decay groups, its clip formula, and optimizer state as named tensors."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


def gradient_norm(model: nn.Module, without: Collection[str] = ()) -> Tensor:
    """Global L2 norm of the gradients, a float32 scalar on the model's device; over all processes when sharded.

    A number that several processes hold counts once, whatever the mesh: one sum of squares goes round. Parameters
    named in `without` do not count here: another stage of a pipeline counts them.
    """
    gradients = [
        p.grad for name, p in model.named_parameters() if p.grad is not None and name not in without
    ]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    own = [
        gradient.to_local()
        for gradient in gradients
        if isinstance(gradient, DTensor) and holds_first_copy(gradient)
    ]
    total = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    for norm in torch._foreach_norm(own) if own else []:
        total += norm.float().square()
    torch.distributed.all_reduce(total)
    return total.sqrt()


def holds_first_copy(tensor: DTensor) -> bool:
    """Whether this process is at place 0 of every axis along which `tensor` is replicated."""
    places = (tensor.device_mesh.get_local_rank(axis) for axis in range(tensor.device_mesh.ndim))
    return not any(
        place and kind.is_replicate() for place, kind in zip(places, tensor.placements, strict=True)
    )


def clip_gradients(model: nn.Module, norm: Tensor, limit: float | None) -> None:
    """Scale gradients by min(1, limit / (norm + 1e-6)), the formula of DeepSpeed and of torch alike."""
    if limit is not None and float(norm) + 1e-6 > limit:
        torch._foreach_mul_(
            [p.grad for p in model.parameters() if p.grad is not None], limit / (float(norm) + 1e-6)
        )
