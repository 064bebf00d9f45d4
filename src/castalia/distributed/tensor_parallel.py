"""Tensor parallelism: each matrix is split over the processes of the tp axis, and the sequence in between.

A model says in `tp_plan` how each of its modules is split; `STYLES` has the words. Between the matrices each process
holds T / tp tokens of every row, so that norms and residuals are split too (Korthikanti et al. 2022, arXiv:2205.05198).
Parameters that are not split (norms, the biases of row-split matrices) become replicated DTensors: the optimizer and
the gradient norm see one kind, and count each number once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from castalia.core.errors import ConfigError
from castalia.distributed.gather import gather

SEQUENCE = 1
"""The dim T of (B, T, C)."""


class GatheredNorm(SequenceParallel):
    """A norm on T / tp tokens whose output is gathered to all T, for a loss that sees a part of the vocabulary."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(
            lambda _, inputs, out: gather(out.to_local(), SEQUENCE, device_mesh.get_group())
        )
        return module


class SplitEmbedding(RowwiseParallel):
    """An embedding split by its rows; each process gets T / tp of the tokens."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=Shard(SEQUENCE))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        # In torch 2.13 a compiled block drops the gradient of an input that awaits its collective; a copy has waited.
        module.register_forward_hook(lambda _, inputs, out: out.clone())
        return module


STYLES: dict[str, Any] = {
    "column": partial(ColwiseParallel, input_layouts=Shard(SEQUENCE)),
    "row": partial(RowwiseParallel, output_layouts=Shard(SEQUENCE)),
    "vocab": SplitEmbedding,
    "sequence": partial(SequenceParallel, sequence_dim=SEQUENCE),
    "gather": partial(GatheredNorm, sequence_dim=SEQUENCE),
    "head": ColwiseParallel,
}
"""column: out-features split; row: in-features split, the bias added once; vocab: an embedding by its rows; sequence: a
norm on T / tp tokens; gather: the last norm; head: the output matrix by tokens of the vocabulary, used by the loss."""


@dataclass(frozen=True)
class VocabPart:
    """The tokens of the vocabulary that this process holds; see castalia.models.cross_entropy."""

    first: int
    count: int
    group: dist.ProcessGroup

    def local(self, weight: Tensor) -> Tensor:
        """This process's rows of the head's weight."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place and returned."""
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the processes, in place and returned."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


def require_split(model: nn.Module) -> None:
    """Every parameter must be a DTensor once the plans are applied.

    A plain one would get the gradient of this rank's tokens alone, since the sequence is split between the matrices:
    the copies on the tp ranks would drift apart without an error.
    Raises  ConfigError naming the parameters that no `tp_plan` mentions.
    """
    missing = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if missing:
        raise ConfigError(
            f"parallel.tp: no tp_plan splits or replicates {', '.join(missing)};"
            " declare their modules in the tp_plan of the block, or use parallel.tp=1"
        )


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply the `tp_plan` of every module that has one over the 1-D `mesh`, before anything else touches the model.

    What the model declares besides: `vocab_part` and `head_share`, set here, and `config.padded_vocab_size`.
    """
    for owner in list(model.modules()):
        plan: dict[str, str] = getattr(owner, "tp_plan", {})
        present = dict(owner.named_modules())
        styles: dict[str, ParallelStyle] = {
            name: STYLES[how]() for name, how in plan.items() if name in present
        }
        if styles:
            parallelize_module(owner, mesh, styles, src_data_rank=None)
    require_split(model)
    count: int = model.config.padded_vocab_size  # type: ignore[union-attr, assignment]
    first = count // mesh.size() * mesh.get_local_rank()
    model.head_share = (mesh.get_local_rank(), mesh.size())  # type: ignore[assignment]
    model.vocab_part = VocabPart(first, count, mesh.get_group())  # type: ignore[assignment]
