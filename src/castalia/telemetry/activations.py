"""Root mean square, largest magnitude, zeros and dead units of the activations of each layer.

Every rank measures the tokens and the channels that it holds, which no other rank of the run has.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from castalia.distributed import World
from castalia.models.model_config import ModelConfig
from castalia.models.parts.mlp import MLP, GatedMLP
from castalia.telemetry.groups import PARTS, put
from castalia.telemetry.watch import Watching, plain, recomputes, stages_of

SITES = ("residual", "attention", "mlp", "mixer", "hidden")
"""Of each layer: its output; what its parts add; and what the MLP multiplies with `down`, the
activations proper."""
ROWS = ("pp", "dp_replicate", "dp_shard", "cp")
"""Axes over which the same hidden units see other tokens, or other layers."""


class Activations(Watching):
    """See the module."""

    def __init__(self, every: int, model: nn.Module, world: World, config: ModelConfig) -> None:
        super().__init__(every, model)
        self.world = world
        self.layers = config.num_layers
        self.channels = config.hidden_size
        # Hidden units of an MLP on this rank; 0 for families without such an MLP.
        self.width = int(getattr(config, "ffn_size", 0)) // world.degrees.tp
        self.leads = all(world.coordinate(axis) == 0 for axis in ROWS)

    @property
    def names(self) -> list[str]:
        """Every site of the whole model, in the order of the vectors."""
        inner = [f"layers/{layer}/{site}" for layer in range(self.layers) for site in SITES]
        return ["embedding", *inner, "norm"]

    def install(self) -> list[RemovableHandle]:
        """Hooks on embedding, layers, their parts, and final norm."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.world.device)
        self.places = {name: place for place, name in enumerate(self.names)}
        self.added: Tensor = zeros(len(self.places), 3)
        self.largest: Tensor = zeros(len(self.places))
        # Below any activation: a layer that is not here must not count.
        low = -math.inf
        self.units = torch.full((self.layers, self.width), low, device=self.world.device)
        handles = []
        for stage in stages_of(self.model):
            for name in ("embed", "norm"):
                module = getattr(stage, name, None)
                # The last stage has a copy of a tied embedding, which no token passes.
                if module is not None and (name == "norm" or stage.span.first):
                    site = "norm"
                    if name == "embed":
                        site = "embedding"
                    handles.append(module.register_forward_hook(partial(self.output, site)))
            for layer, block in stage.layers.named_children():
                handles += self.install_layer(int(layer), block)
        return handles

    def install_layer(self, layer: int, block: nn.Module) -> list[RemovableHandle]:
        """Hooks of one layer."""
        at = f"layers/{layer}"
        handles = [block.register_forward_hook(partial(self.output, f"{at}/residual"))]
        for name, module in block.named_children():
            if name.startswith("norm"):
                continue
            site = PARTS.get(name, "mixer")
            handles.append(module.register_forward_hook(partial(self.output, f"{at}/{site}")))
            if isinstance(module, MLP | GatedMLP):
                # A product of a gate has either sign; any other unit is on where it is positive.
                signed = isinstance(module, MLP)
                hook = partial(self.hidden, layer, signed)
                handles.append(module.down.register_forward_pre_hook(hook))
        return handles

    def output(self, site: str, module: nn.Module, inputs: Any, out: Any) -> None:
        """Measure what a module returns."""
        if recomputes():
            return
        # Some mixers return a second tensor, and some blocks hand on numbers behind the stream.
        first = out
        if isinstance(out, tuple):
            first = out[0]
        self.measure(site, plain(first)[..., : self.channels])

    def hidden(self, layer: int, signed: bool, module: nn.Module, inputs: Any) -> None:
        """Measure what `down` multiplies."""
        if recomputes():
            return
        values = plain(inputs[0])
        self.measure(f"layers/{layer}/hidden", values)
        if values.shape[-1] == self.width:
            each = (values if signed else values.abs()).flatten(0, -2).amax(0)
            torch.maximum(self.units[layer], each.float(), out=self.units[layer])

    @torch.no_grad()
    def measure(self, site: str, values: Tensor) -> None:
        """Add up one tensor; nothing here waits for the device."""
        place = self.places[site]
        if not values.numel():
            return
        square = torch.linalg.vector_norm(values, dtype=torch.float32).double().square()
        nonzero = torch.count_nonzero(values)
        count = torch.full_like(square, values.numel())
        self.added[place] += torch.stack([square, count, count - nonzero])
        peak = torch.linalg.vector_norm(values, math.inf, dtype=torch.float32).double()
        torch.maximum(self.largest[place], peak, out=self.largest[place])

    def finish(self) -> None:
        """Reduce the units over the ranks that hold the same; put the sums together."""
        units = self.units
        if self.world.size > 1 and self.width:
            dist.all_reduce(units, dist.ReduceOp.MAX, group=self.world.parts)
        # One rank of those that hold the same units counts them.
        dead = (units <= 0) & (units > -math.inf)
        counts = torch.stack([dead.sum(1), (units > -math.inf).sum(1)], 1).double() * self.leads
        self.sums = torch.cat([self.added.flatten(), counts.flatten()])
        self.maxima = self.largest

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """`activations/SITE/{rms,max,zeros}` and `activations/layers/N/hidden/dead`."""
        out: dict[str, Any] = {}
        names = self.names
        for place, name in enumerate(names):
            square, count, zeros = sums[3 * place : 3 * place + 3]
            if count:
                rms = math.sqrt(square / count)
                put(out, name, {"rms": rms, "max": maxima[place], "zeros": zeros / count})
        units = sums[3 * len(names) :]
        for layer in range(self.layers):
            dead, count = units[2 * layer : 2 * layer + 2]
            if count:
                put(out, f"layers/{layer}/hidden/dead", dead / count)
        return {"activations": out}
