"""Norms, zeros and maxima of named tensors, added up by groups over any layout of ranks."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.distributed import World
from castalia.distributed.boxes import holds_first_copy
from castalia.optim.layout import local
from castalia.telemetry.groups import Groups

ROWS = ("dp_replicate", "dp_shard", "cp", "tp")
"""Axes whose ranks hold equal plain tensors."""


class Grouped:
    """Numbers of each group, of the parts of tensors that this rank counts.

    Replicated parts are counted once, by the rank that holds their first copy, and `copies`, which
    another stage of a pipeline has as well, by that one.
    """

    def __init__(self, groups: Groups, world: World, copies: Collection[str] = ()) -> None:
        self.groups = groups
        self.device = world.device
        self.copies = frozenset(copies)
        self.counts_plain = all(world.coordinate(axis) == 0 for axis in ROWS)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank counts, its part of each as a plain tensor."""
        counted = {}
        for name, tensor in tensors.items():
            if name in self.copies:
                continue
            if isinstance(tensor, DTensor):
                part = None
                # Copies of a tensor count on one rank only.
                if holds_first_copy(tensor):
                    part = local(tensor)
            else:
                part = None
                if self.counts_plain:
                    part = tensor.detach()
            if part is not None and part.numel():
                counted[name] = part
        return counted

    def squares(self, own: Mapping[str, Tensor]) -> Tensor:
        """Sum of squares of each group, float64 (G,)."""
        return self.added(own, self.norms(own, 2).square())

    def sizes(self, own: Mapping[str, Tensor]) -> Tensor:
        """Numbers in each group, float64 (G,)."""
        counts = [float(part.numel()) for part in own.values()]
        return self.added(own, torch.tensor(counts, dtype=torch.float64, device=self.device))

    def zeros(self, own: Mapping[str, Tensor]) -> Tensor:
        """Numbers of each group that are exactly 0, float64 (G,)."""
        counts = [part.numel() - torch.count_nonzero(part) for part in own.values()]
        return self.added(own, self.stacked(counts))

    def largest(self, own: Mapping[str, Tensor]) -> Tensor:
        """Largest magnitude of each group, float64 (G,)."""
        out = torch.zeros(len(self.groups.names), dtype=torch.float64, device=self.device)
        return out.scatter_reduce(0, self.places(own), self.norms(own, math.inf), "amax")

    def norms(self, own: Mapping[str, Tensor], order: float) -> Tensor:
        """The norm of each tensor, float64."""
        if not own:
            return self.stacked([])
        # Summed in fp32 also where tensors are bf16, whose norm has 8 bits otherwise.
        return self.stacked(torch._foreach_norm(list(own.values()), order, dtype=torch.float32))

    def added(self, own: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """One value a tensor, summed by group."""
        out = torch.zeros(len(self.groups.names), dtype=torch.float64, device=self.device)
        return out.index_add(0, self.places(own), values)

    def places(self, own: Mapping[str, Tensor]) -> Tensor:
        """The place of each tensor's group, int64."""
        found = [self.groups.place(name) for name in own]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def stacked(self, values: Any) -> Tensor:
        """Scalars as a float64 vector; none is a vector of size 0."""
        values = list(values)
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        return torch.stack(values).double()

    def read_norms(self, squares: list[float], sizes: list[float]) -> dict[str, Any]:
        """L2 norms by group and of `all`; groups without a number are left out."""
        norms = [
            math.sqrt(square) if size else None for square, size in zip(squares, sizes, strict=True)
        ]
        return {"all": math.sqrt(sum(squares)), **self.groups.nested(norms)}
