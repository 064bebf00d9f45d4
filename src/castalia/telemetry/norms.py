"""Statistics of what an update reads and writes: gradients, weights, the update, and its state."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from castalia.optim.config import OPTIMIZERS
from castalia.optim.groups import Rules
from castalia.optim.updater import Updater
from castalia.telemetry.statistic import Statistic
from castalia.telemetry.tensors import Grouped


class OfTensors(Statistic):
    """A statistic of the named tensors of an updater."""

    def __init__(self, every: int, grouped: Grouped, updater: Updater) -> None:
        super().__init__(every)
        self.grouped = grouped
        self.updater = updater

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of the gradients."""
        parameters = self.updater.weights.parameters.items()
        return self.grouped.own({name: p.grad for name, p in parameters if p.grad is not None})

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of the weights: fp32 masters where they exist, also what is frozen."""
        whole = dict(self.updater.model.named_parameters())
        return self.grouped.own(whole | dict(self.updater.parameters))

    def measure_norms(self, own: Mapping[str, Tensor]) -> None:
        """Keep what `norms` reads."""
        self.sums = torch.stack([self.grouped.squares(own), self.grouped.sizes(own)])

    def norms(self, sums: list[float]) -> dict[str, Any]:
        """L2 norms by group."""
        half = len(sums) // 2
        return self.grouped.read_norms(sums[:half], sums[half:])


class GradientNorms(OfTensors):
    """L2 norms of the gradient before clipping."""

    def before_update(self, norm: float) -> None:
        """Measure."""
        self.measure_norms(self.gradients())

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`gradient_norms/...`."""
        return {"gradient_norms": self.norms(sums)}


class WeightNorms(OfTensors):
    """L2 norms of the weights after the update."""

    def after_update(self) -> None:
        """Measure."""
        self.measure_norms(self.weights())

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`weight_norms/...`."""
        return {"weight_norms": self.norms(sums)}


class UpdateNorms(OfTensors):
    """L2 norms of the differences that the update makes, weight decay included."""

    before: dict[str, Tensor] = {}

    def before_update(self, norm: float) -> None:
        """Keep the weights as they are."""
        own = self.grouped.own(self.updater.parameters)
        self.before = {name: part.clone() for name, part in own.items()}

    def after_update(self) -> None:
        """Subtract them, in their own memory."""
        own = self.grouped.own(self.updater.parameters)
        for name, part in own.items():
            self.before[name].sub_(part)
        self.measure_norms(self.before)
        self.before = {}

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`update_norms/...`."""
        return {"update_norms": self.norms(sums)}


class StateNorms(OfTensors):
    """L2 norms of each kind of state that the optimizers keep in floating point."""

    def after_update(self) -> None:
        """Measure, one pair of rows a kind."""
        states = self.states()
        names = self.suffixes()
        pairs = []
        for name in names:
            own = self.grouped.own(states.get(name, {}))
            pairs += [self.grouped.squares(own), self.grouped.sizes(own)]
        if names:
            self.sums = torch.stack(pairs)

    def suffixes(self) -> list[str]:
        """Names of the kinds of state, the same on every rank: of all optimizers of the config."""
        rules = self.updater.rules
        kinds = {rules.config.kind, *(group.kind for group in rules.config.groups if group.kind)}
        return sorted({name for kind in kinds for name in declared_by(rules, kind)})

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Kind of state -> parameter -> its tensor."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.updater.tensors().items():
            _, suffix, name = key.split(".", 2)
            # Quantized moments are codes, whose norm says nothing.
            if tensor.is_floating_point():
                states.setdefault(suffix, {})[name] = tensor
        return states

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`state_norms/KIND/...`."""
        names = self.suffixes()
        each = len(sums) // len(names)
        norms = {
            name: self.norms(sums[place * each : (place + 1) * each])
            for place, name in enumerate(names)
        }
        # A kind of integers alone has no number in any group.
        return {"state_norms": {name: norm for name, norm in norms.items() if len(norm) > 1}}


class ZeroGradients(OfTensors):
    """Share of the gradient's numbers that are exactly 0."""

    def before_update(self, norm: float) -> None:
        """Measure."""
        own = self.gradients()
        self.sums = torch.stack([self.grouped.zeros(own), self.grouped.sizes(own)])

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`zero_gradients/...`, between 0 and 1."""
        half = len(sums) // 2
        shares = [
            zero / size if size else None
            for zero, size in zip(sums[:half], sums[half:], strict=True)
        ]
        total = sum(sums[:half]) / max(1.0, sum(sums[half:]))
        return {"zero_gradients": {"all": total, **self.grouped.groups.nested(shares)}}


class WeightStatistics(OfTensors):
    """Root mean square, largest magnitude and share of zeros of the weights after the update."""

    def after_update(self) -> None:
        """Measure."""
        own = self.weights()
        grouped = self.grouped
        self.sums = torch.stack([grouped.squares(own), grouped.sizes(own), grouped.zeros(own)])
        self.maxima = grouped.largest(own)

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`weights/GROUP/{rms,max,zeros}`."""
        third = len(sums) // 3
        rows = zip(sums[:third], sums[third : 2 * third], sums[2 * third :], maxima, strict=True)
        values = [
            {"rms": math.sqrt(square / size), "max": largest, "zeros": zero / size}
            if size
            else None
            for square, size, zero, largest in rows
        ]
        return {"weights": self.grouped.groups.nested(values)}


def declared_by(rules: Rules, kind: str) -> list[str]:
    """Names of the saved states of the optimizer `kind`."""
    state = OPTIMIZERS[kind].state(rules.config_of(kind))
    return [name for name, tensor in state.items() if tensor.saved]
