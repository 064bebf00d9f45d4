"""`Statistic`: something measured in a step, and `Telemetry`, all those of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.data import Batch
from castalia.distributed import World
from castalia.monitor.parts import part
from castalia.telemetry.times import STATISTICS

EagerPasses = Callable[[Sequence[Batch]], None]
"""Runs micro-batches forward, uncompiled and without a gradient."""


class PassesOf(NamedTuple):
    """The passes of a step that is about to be taken."""

    step: int
    """Its number, from 1."""
    micro_batches: Sequence[Batch]
    """The rows of this rank."""
    loss_scale: float


class Statistic:
    """A number, or many, of a step. Subclasses override what they need.

    sums, maxima  what this rank measured, float64 vectors of the same size on all ranks; None
                  where the step gave nothing, on all ranks alike. They are reduced over all ranks
                  together, so that replicated values must be counted by one of them.
    watches       whether its `watch` puts something into the blocks.
    """

    watches = False

    def __init__(self, every: int) -> None:
        self.every = every
        self.sums: Tensor | None = None
        self.maxima: Tensor | None = None

    def begin(self, passes: PassesOf) -> None:
        """Before the passes of a step that is measured."""

    def watch(self) -> AbstractContextManager[None]:
        """Around passes whose inside is measured."""
        return nullcontext()

    def before_update(self, norm: float) -> None:
        """The gradients are whole, unscaled and not clipped; `norm` is their global L2 norm."""

    def after_update(self) -> None:
        """The weights are those after the update; gradients may be clipped."""

    def metrics(self, sums: list[float], maxima: list[float]) -> Mapping[str, Any]:
        """The metrics of what all ranks measured."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resume must have, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


class Telemetry:
    """The statistics of a run. Without one, nothing here costs anything.

    eager  runs the passes of the micro-batches without gradients outside of torch.compile; None
           where blocks are not compiled. Compiled code does not run what is inserted into a block.
    """

    def __init__(
        self,
        statistics: Mapping[str, Statistic],
        world: World,
        eager: EagerPasses | None = None,
    ) -> None:
        self.statistics = dict(statistics)
        self.world = world
        self.eager = eager
        self.due: list[Statistic] = []

    @contextmanager
    def watching(self, passes: PassesOf) -> Iterator[None]:
        """Around the passes of a step."""
        self.due = [each for each in self.statistics.values() if passes.step % each.every == 0]
        inside = [each for each in self.due if each.watches]
        with ExitStack() as around:
            with part(STATISTICS):
                for each in self.due:
                    each.begin(passes)
                if self.eager is not None and inside:
                    self.run_eagerly(inside, passes, self.eager)
                    inside = []
                for each in inside:
                    around.enter_context(each.watch())
            # Innermost: what is recorded is the passes, not the work of others.
            for each in self.due:
                if not each.watches:
                    around.enter_context(each.watch())
            yield

    def run_eagerly(
        self, inside: Sequence[Statistic], passes: PassesOf, eager: EagerPasses
    ) -> None:
        """Measure passes that were made for it."""
        with ExitStack() as watches:
            for each in inside:
                watches.enter_context(each.watch())
            eager(passes.micro_batches)

    def drop(self) -> None:
        """Forget a step that did not happen."""
        self.due = []

    def before_update(self, norm: float) -> None:
        """See `Statistic.before_update`."""
        with part(STATISTICS):
            for each in self.due:
                each.before_update(norm)

    def after_update(self) -> None:
        """See `Statistic.after_update`."""
        with part(STATISTICS):
            for each in self.due:
                each.after_update()

    def take(self) -> dict[str, Any]:
        """The metrics of the step; two small collectives for all statistics together."""
        measured = [each for each in self.due if each.sums is not None]
        self.due = []
        if not measured:
            return {}
        with part(STATISTICS):
            sums = self.reduced([each.sums for each in measured], dist.ReduceOp.SUM)
            maxima = self.reduced([each.maxima for each in measured], dist.ReduceOp.MAX)
        metrics: dict[str, Any] = {}
        for each, added, largest in zip(measured, sums, maxima, strict=True):
            metrics |= each.metrics(added, largest)
            each.sums = None
            each.maxima = None
        return metrics

    def reduced(
        self, vectors: Sequence[Tensor | None], operation: dist.ReduceOp.RedOpType
    ) -> list[list[float]]:
        """Each vector over all ranks; [] for None."""
        given = [vector for vector in vectors if vector is not None]
        if not given:
            return [[] for _ in vectors]
        # Vectors without a number may be on the CPU.
        flat = torch.cat([vector.flatten().to(self.world.device) for vector in given])
        if self.world.size > 1:
            dist.all_reduce(flat, operation)
        # The one wait for the device.
        numbers = iter(flat.tolist())
        sizes = [0 if vector is None else vector.numel() for vector in vectors]
        return [[next(numbers) for _ in range(size)] for size in sizes]

    def state_dict(self) -> dict[str, Any]:
        """The states of the statistics that have one."""
        states = {name: each.state_dict() for name, each in self.statistics.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a statistic that the checkpoint lacks begins anew."""
        for name, each in self.statistics.items():
            if name in state:
                each.load_state_dict(state[name])
