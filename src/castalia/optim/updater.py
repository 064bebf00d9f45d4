"""`Updater`: the optimizers of a run, over the parameters that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from castalia.core.errors import ConfigError
from castalia.monitor.parts import UPDATE, part
from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS
from castalia.optim.groups import Rules, UpdateRule
from castalia.optim.layout import local, make_state
from castalia.optim.masters import Storage, weights_of


class Updater:
    """One torch optimizer a kind, each over its parameter groups; most runs have a single one.

    Only parameters that require a gradient have state. All state exists from the start, so that
    loading a checkpoint fills it in place.
    """

    def __init__(self, model: nn.Module, rules: Rules, storage: Storage | None = None) -> None:
        """`storage` says how the parameters are kept, by default in fp32; see masters.py."""
        self.model = model
        self.rules = rules
        self.weights = weights_of(model, storage or Storage())
        self.parameters = self.weights.targets
        self.updates = 0
        self.optimizers = {
            kind: OPTIMIZERS[kind].build(groups, rules.config_of(kind))
            for kind, groups in parameter_groups(self.parameters, rules).items()
        }
        self.fill()
        self.restore(0)

    def fill(self) -> None:
        """Make all state.

        Raises  ConfigError if an optimizer cannot update a part of a parameter.
        """
        for name, parameter in self.parameters.items():
            weight = self.rules.weight(name, parameter.shape)
            own = tuple(local(parameter).shape)
            if own != weight.shape and (why := self.member(name).objection(weight, own)):
                kind = self.rules.rule(name).kind
                raise ConfigError(
                    f"optimizer {kind} cannot take a sharded parameter: {name} {why}; choose other"
                    " degrees in parallel, or another optim.kind"
                )
            for suffix, tensor in declared(self.rules, name).items():
                values = make_state(parameter, weight, tensor)
                if values is not None:
                    self.state(name)[suffix] = values

    def member(self, name: str) -> type[Member]:
        """The optimizer of a parameter."""
        member: type[Member] = OPTIMIZERS[self.rules.rule(name).kind]
        return member

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
            for suffix, tensor in declared(self.rules, name).items()
            if tensor.saved and suffix in self.state(name)
        }

    def averages(self) -> dict[str, Tensor]:
        """Parameter -> the average that stands for it, where its optimizer keeps one."""
        return {
            name: self.state(name)[suffix]
            for name in self.parameters
            if (suffix := self.member(name).averaged) is not None
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode, with the weights that a checkpoint would have;
        the training around it is the same as without."""
        self.model.eval()
        self.show_averages()
        try:
            yield
        finally:
            if self.averages():
                self.restore(self.updates)
                self.drop_gathered()
            self.model.train()

    @torch.no_grad()
    def show_averages(self) -> None:
        """Put the averages, where there are some, in the place of the parameters."""
        averages = self.averages()
        for name, average in averages.items():
            local(self.parameters[name]).copy_(local(average))
        if averages:
            self.weights.loaded()
            self.drop_gathered()

    def drop_gathered(self) -> None:
        """Let FSDP gather the parameters again: without a backward pass it keeps the root's."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def restore(self, updates: int) -> None:
        """Set what follows from the state, from weights that were loaded and from the number of
        updates made, such as Adam's step count."""
        self.updates = updates
        for name, parameter in self.parameters.items():
            self.state(name).update(self.member(name).counters(parameter, updates))
        for kind, optimizer in self.optimizers.items():
            OPTIMIZERS[kind].restored(optimizer)
        self.weights.loaded()

    def step(self, lr: float) -> None:
        """One update at the rate `lr`, which each group scales."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        with part(UPDATE):
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
        for name, parameter in trained_parameters(whole).items()
        for suffix, tensor in declared(rules, name).items()
        if tensor.saved and tensor.shape(rules.weight(name, parameter.shape)) is not None
    }


class StateSizes(NamedTuple):
    """Averages over all parameters of a model: multiplied by their number they give bytes."""

    state_bytes: float
    """Memory of the optimizer's state for each parameter."""
    saved_bytes: float
    """The part of it that a checkpoint has."""
    trained: float
    """Share of the parameters that train."""


def state_sizes(model: nn.Module, rules: Rules) -> StateSizes:
    """What the optimizer keeps for `model`, which may be on the meta device."""
    freeze(model, rules)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = 0
    state_bytes = 0
    saved_bytes = 0
    for name, parameter in trained_parameters(model).items():
        trained += parameter.numel()
        weight = rules.weight(name, parameter.shape)
        for tensor in declared(rules, name).values():
            state_bytes += tensor.bytes_of(weight)
            saved_bytes += tensor.bytes_of(weight) * tensor.saved
    return StateSizes(state_bytes / total, saved_bytes / total, trained / total)
