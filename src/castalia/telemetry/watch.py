"""`Watching`: statistics of what passes through a model, by hooks that are there for one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from castalia.telemetry.statistic import Statistic


class Watching(Statistic):
    """A statistic of the insides of the passes. Hooks are removed after them, and add nothing to
    the graph of autograd."""

    watches = True

    def __init__(self, every: int, model: nn.Module) -> None:
        super().__init__(every)
        self.model = model

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around the passes."""
        handles = self.install()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        # Not after an error: `finish` may be a collective, which the other ranks do not join.
        self.finish()

    def install(self) -> list[RemovableHandle]:
        """Put the hooks into the model."""
        raise NotImplementedError

    def finish(self) -> None:
        """Put `sums` and `maxima` together."""


def stages_of(model: nn.Module) -> list[Any]:
    """The decoder, or the stages of a pipeline on this rank."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [model]


def recomputes() -> bool:
    """Whether a layer only runs again for its backward pass: it was measured in the forward."""
    return bool(torch._C._current_graph_task_id() != -1)


def plain(tensor: Tensor) -> Tensor:
    """This rank's part, outside of autograd."""
    part = tensor.detach()
    if isinstance(part, DTensor):
        return part.to_local()
    return part
