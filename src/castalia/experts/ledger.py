"""What the experts of a model did in a step: one vector of sums, and the metrics made of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castalia.experts.config import MoeConfig

SUMS = ("tokens", "rows", "dropped", "balance", "z", "entropy")
"""Of each layer, behind the assignments of each expert."""


class Ledger:
    """The sums of this rank, of all layers of the model that have experts.

    Layers that are not on this rank's stage stay zeros, so that the vectors of all ranks add up.
    `scale` is what a layer multiplies the auxiliary losses of a row with: the loss scale over the
    rows of the step. The trainer sets it before the passes, and `padding` where a rank without a
    row runs one that is neither counted nor balanced.
    """

    def __init__(self, layers: Sequence[int], config: MoeConfig) -> None:
        """`layers` are the places of the layers with experts in the whole model."""
        self.places = {layer: place for place, layer in enumerate(layers)}
        self.experts = config.experts
        self.scale = 0.0
        self.padding = False
        self.sums: Tensor | None = None

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return len(self.places) * (self.experts + len(SUMS))

    @property
    def records(self) -> bool:
        """Whether tokens that pass now are counted: once, in the forward pass of training."""
        # Inside of a backward pass a layer is only computed again.
        recomputes = torch._C._current_graph_task_id() != -1
        return torch.is_grad_enabled() and not recomputes and not self.padding

    def record(self, layer: int, counts_E: Tensor, sums: Tensor) -> None:
        """Add what a pass did in a layer: assignments of each expert, and SUMS, float64 (6,)."""
        if self.sums is None:
            width = self.experts + len(SUMS)
            shape = (len(self.places), width)
            self.sums = torch.zeros(shape, dtype=torch.float64, device=counts_E.device)
        self.sums[self.places[layer]] += torch.cat([counts_E.double(), sums])

    def take(self, device: torch.device) -> Tensor:
        """The sums since the last call, float64 (size,); they begin anew."""
        if self.sums is None:
            return torch.zeros(self.size, dtype=torch.float64, device=device)
        taken = self.sums.flatten().to(device)
        self.sums = None
        return taken


class LayerLoad(NamedTuple):
    """What the experts of one layer did in a step, on all ranks."""

    layer: int
    counts: list[float]
    """Assignments of each expert, before drops."""
    tokens: float
    rows: float
    dropped: float
    """Assignments that found no room."""
    balance: float
    z: float
    entropy: float
    """These three are sums: over rows, rows and tokens."""

    @property
    def load(self) -> list[float]:
        """Share of the assignments that each expert got; zeros without a token."""
        total = sum(self.counts) or 1.0
        return [count / total for count in self.counts]

    @property
    def load_max(self) -> float:
        """The largest share over an equal one."""
        return max(self.load) * len(self.counts)

    @property
    def dropped_share(self) -> float:
        """Share of the assignments that were dropped."""
        return self.dropped / (sum(self.counts) or 1.0)


def read_loads(ledger: Ledger, vector: Sequence[float]) -> list[LayerLoad]:
    """The layers of a vector of all ranks' sums."""
    width = ledger.experts + len(SUMS)
    loads = []
    for layer, place in ledger.places.items():
        numbers = list(vector[place * width : (place + 1) * width])
        loads.append(LayerLoad(layer, numbers[: ledger.experts], *numbers[ledger.experts :]))
    return loads


def load_metrics(loads: Sequence[LayerLoad]) -> dict[str, Any]:
    """The numbers of a step for metrics.jsonl; {} if no token passed."""
    if not loads or not loads[0].tokens:
        return {}
    layers = [
        {
            "layer": load.layer,
            "load": load.load,
            "load_max": load.load_max,
            "dropped": load.dropped_share,
            "entropy": load.entropy / load.tokens,
            "aux_loss": load.balance / load.rows,
        }
        for load in loads
    ]
    assignments = sum(sum(load.counts) for load in loads)
    count = len(loads)
    return {
        "moe/load_max": max(load.load_max for load in loads),
        "moe/dropped": sum(load.dropped for load in loads) / assignments,
        "moe/aux_loss": sum(load.balance / load.rows for load in loads) / count,
        "moe/z_loss": sum(load.z / load.rows for load in loads) / count,
        "moe/entropy": sum(load.entropy / load.tokens for load in loads) / count,
        "moe/layers": layers,
    }
