"""`Updater`: the optimizers of a run, over the parameters that train."""

import torch
from torch import Tensor, nn

from castalia.optim.base import StateTensor
from castalia.optim.config import OPTIMIZERS
from castalia.optim.groups import Rules, UpdateRule
from castalia.optim.masters import Storage, weights_of


class Updater:
    """One torch optimizer a kind, each over its parameter groups; most runs have a single one.

    Only parameters that require a gradient have state. All state exists from the start, so that
    loading a checkpoint fills it in place.
    """

    def __init__(self, model: nn.Module, rules: Rules, storage: Storage | None = None) -> None:
        """`storage` says how the parameters are kept, by default in fp32; see masters.py."""
        self.rules = rules
        self.weights = weights_of(model, storage or Storage())
        self.parameters = self.weights.targets
        self.updates = 0
        self.optimizers = {
            kind: OPTIMIZERS[kind].build(groups, rules.config_of(kind))
            for kind, groups in parameter_groups(self.parameters, rules).items()
        }
        self.restore(0)
        for name, parameter in self.parameters.items():
            self.state(name).update(
                (suffix, torch.zeros_like(parameter, dtype=getattr(torch, tensor.dtype)))
                for suffix, tensor in declared(rules, name).items()
            )

    def state(self, name: str) -> dict[str, Tensor]:
        """The live state of one parameter, as its torch optimizer sees it."""
        state: dict[str, Tensor] = self.optimizers[self.rules.rule(name).kind].state[
            self.parameters[name]
        ]
        return state

    def tensors(self) -> dict[str, Tensor]:
        """`optim.<suffix>.<parameter>` -> the live state tensor, to save or to fill."""
        return {
            f"optim.{suffix}.{name}": self.state(name)[suffix]
            for name in self.parameters
            for suffix in declared(self.rules, name)
        }

    def restore(self, updates: int) -> None:
        """Set what follows from the number of updates made, such as Adam's step count, and from
        weights that were loaded."""
        self.updates = updates
        self.weights.loaded()
        for name, parameter in self.parameters.items():
            member = OPTIMIZERS[self.rules.rule(name).kind]
            self.state(name).update(member.counters(parameter, updates))

    def step(self, lr: float) -> None:
        """One update at the rate `lr`, which each group scales."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        self.weights.step(self.optimizers.values(), self.updates)
        self.updates += 1

    def zero_grad(self) -> None:
        """Drop all gradients, and their memory with them."""
        self.weights.zero_grad()


def freeze(model: nn.Module, rules: Rules) -> None:
    """Let the parameters that do not train require no gradient: no backward work, no state, no
    bytes."""
    for name, parameter in model.named_parameters():
        if not rules.trains(name):
            parameter.requires_grad_(False)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a tied one counts once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(
    parameters: dict[str, nn.Parameter], rules: Rules
) -> dict[str, list[dict[str, object]]]:
    """Kind -> torch's parameter groups: parameters of one rule together, in the order of the
    model."""
    by_rule: dict[UpdateRule, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_rule.setdefault(rules.rule(name), []).append(parameter)
    groups: dict[str, list[dict[str, object]]] = {}
    for rule, members in by_rule.items():
        group: dict[str, object] = {"params": members, "weight_decay": rule.weight_decay}
        # Kept in the group, so that the rate of a step can be set without looking at names.
        group["lr_scale"] = rule.lr_scale
        groups.setdefault(rule.kind, []).append(group)
    return groups


def declared(rules: Rules, name: str) -> dict[str, StateTensor]:
    """Suffix -> state tensor that the optimizer of this parameter keeps."""
    kind = rules.rule(name).kind
    state: dict[str, StateTensor] = OPTIMIZERS[kind].state(rules.config_of(kind))
    return state


def state_names(whole: nn.Module, rules: Rules) -> set[str]:
    """Names of all state tensors of a model, which may be on the meta device.

    A pipeline stage asks it of the whole model: a checkpoint also holds what other ranks train.
    """
    # Frozen as on every rank: by the rules, and by families that keep a constant as a parameter.
    freeze(whole, rules)
    return {
        f"optim.{suffix}.{name}"
        for name in trained_parameters(whole)
        for suffix in declared(rules, name)
    }


def state_sizes(model: nn.Module, rules: Rules) -> tuple[float, float]:
    """Bytes of optimizer state for each parameter of `model`, and the share of parameters that
    train.

    Both are averages over all parameters, so that multiplied by a number of parameters they give
    bytes; the model may be on the meta device.
    """
    freeze(model, rules)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = 0
    state_bytes = 0.0
    for name, parameter in trained_parameters(model).items():
        trained += parameter.numel()
        each = sum(tensor.bytes_per_weight for tensor in declared(rules, name).values())
        state_bytes += each * parameter.numel()
    return state_bytes / total, trained / total
