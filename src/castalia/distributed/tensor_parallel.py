"""Tensor parallelism: the ranks of the tp axis split each matrix, and the sequence between
matrices.

A module's `tp_plan` says how each of its children is split, in the words of `STYLES`. Between the
matrices each rank holds T / tp tokens of every row, so norms and residuals are split as well.
Parameters that are not split (norms, biases of row-split matrices) become replicated DTensors, so
that their gradients are summed over the tp ranks and the norm counts them once.

Source  Shoeybi et al. 2019, arXiv:1909.08053 (the splits); Korthikanti et al. 2022,
        arXiv:2205.05198 (sequence parallelism).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
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


LINEAR_AXES = {"weight": ("outputs", "inputs"), "bias": ("outputs",)}
"""What each dim of a Linear's parameters is."""


def split_axis(linear: nn.Module, axis: str, mesh: DeviceMesh) -> None:
    """Split a Linear's parameters along the dim that is its outputs or its inputs; those without
    such a dim become replicated.

    A layer with more parameters names their dims in `split_axes`, as LINEAR_AXES does.
    """
    axes: dict[str, tuple[str, ...]] = getattr(linear, "split_axes", LINEAR_AXES)
    for name, parameter in list(linear.named_parameters(recurse=False)):
        dims = axes[name]
        placement = Shard(dims.index(axis)) if axis in dims else Replicate()
        # src_data_rank=None: the values come later, there is nothing to broadcast.
        split = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        linear.register_parameter(name, nn.Parameter(split, parameter.requires_grad))


class Columns(ColwiseParallel):
    """A Linear split by output features."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        split_axis(module, "outputs", device_mesh)


class Rows(RowwiseParallel):
    """A Linear split by input features."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        split_axis(module, "inputs", device_mesh)


class GatheredNorm(SequenceParallel):
    """The final norm on T / tp tokens, its output gathered to all T.

    The loss needs all tokens on every rank, since each rank holds a part of the vocabulary.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(
            lambda _, inputs, out: gather(out.to_local(), SEQUENCE, device_mesh.get_group())
        )
        return module


class SplitEmbedding(RowwiseParallel):
    """An embedding split by rows of its weight; each rank gets T / tp of the tokens."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=Shard(SEQUENCE))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        # torch 2.13: a compiled block drops the gradient of an input whose collective is still
        # pending. Copying it waits for the collective.
        module.register_forward_hook(lambda _, inputs, out: out.clone())
        return module


class WholeParameters(ParallelStyle):
    """A module whose parameters every rank holds and uses for a part of the work.

    The module itself takes them with `to_local(grad_placements=[Partial()])`, so that its gradients
    are summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


class GatheredInput(ParallelStyle):
    """A module whose first argument is gathered from T / tp to T tokens, for several matrices.

    The argument stays a DTensor: the gradients of the matrices are added up before they are summed
    over the ranks and scattered, one collective for all.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gathered(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            part = inputs[0]
            # A norm before it returns a DTensor; where norms come after, the input is plain.
            if not isinstance(part, DTensor):
                part = DTensor.from_local(part, device_mesh, (Shard(SEQUENCE),), run_check=False)
            return part.redistribute(placements=(Replicate(),)), *inputs[1:]

        module.register_forward_pre_hook(gathered)
        return module


class OwnParts(ParallelStyle):
    """A module whose parameters are split along one of their axes, as `split_axis` names them, and
    which takes its part of each itself."""

    def __init__(self, axis: str) -> None:
        super().__init__()
        self.axis = axis

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_axis(module, self.axis, device_mesh)
        return module


class WholeLinear(ParallelStyle):
    """A Linear that every rank computes in full, of whose outputs it uses those of its own heads.

    Its input is gathered already; the gradient of its output is a part of the sum over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = distribute_module(module, device_mesh)
        module.register_forward_hook(
            lambda _, inputs, out: out.to_local(grad_placements=[Partial()])
        )
        return module


def heads_style(heads: int, size: int) -> ParallelStyle:
    """The style of keys or values: split by heads where there is one for each rank."""
    return WholeLinear() if heads < size else Columns(input_layouts=Replicate())


STYLES: dict[str, Any] = {
    "column": partial(Columns, input_layouts=Shard(SEQUENCE)),
    "gathered": GatheredInput,
    "columns": partial(Columns, input_layouts=Replicate()),
    "whole": WholeParameters,
    "row": partial(Rows, output_layouts=Shard(SEQUENCE)),
    "vocab": SplitEmbedding,
    "sequence": partial(SequenceParallel, sequence_dim=SEQUENCE),
    "added": partial(SequenceParallel, sequence_dim=SEQUENCE, use_local_output=True),
    "gather": partial(GatheredNorm, sequence_dim=SEQUENCE),
    "head": Columns,
    "outputs": partial(OwnParts, "outputs"),
    "inputs": partial(OwnParts, "inputs"),
}
"""The words of a `tp_plan`:

column    a Linear split by output features; its input is gathered from T / tp to T tokens
gathered  a module whose input is gathered from T / tp to T tokens, once for several matrices
columns   a Linear split by output features, inside a gathered module
heads:N   the same for the keys or values of N heads; with fewer heads than ranks each rank computes
          all of them
whole     a module whose parameters every rank holds and uses for its own heads or tokens
row       a Linear split by input features; its output is summed and scattered, the bias added once
vocab     an Embedding split by rows
sequence  a norm on T / tp tokens
added     the same where its output is added to the residual stream, which is a plain tensor
gather    the final norm
head      the output matrix split by tokens of the vocabulary; the loss uses it
outputs   parameters split by output features, of a module that takes its own part of them
groups:N  as outputs, for N groups of them; with fewer groups than ranks every rank holds all
inputs    as outputs, by input features; the module sums over the ranks itself
"""


@dataclass(frozen=True)
class VocabPart:
    """The tokens of the vocabulary that this rank holds; see castalia.losses.cross_entropy."""

    first: int
    count: int
    group: dist.ProcessGroup

    def local(self, weight: Tensor) -> Tensor:
        """This rank's rows of the head's weight."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the tp ranks, in place and returned."""
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the tp ranks, in place and returned."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


# Compiled, the collective would be traced into the block, and inductor has no autograd for it.
@torch.compiler.disable
def sum_over(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of each rank's values; the gradient of each rank's is the sum of theirs all."""
    return gather(values[None], 0, group).sum(0)


def require_split(model: nn.Module) -> None:
    """Refuse a parameter that is still a plain tensor after the plans are applied.

    The sequence is split between the matrices, so a plain parameter would get the gradient of this
    rank's tokens only, and its copies on the tp ranks would drift apart without an error.
    Raises  ConfigError naming the parameters that no `tp_plan` mentions.
    """
    missing = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if missing:
        raise ConfigError(
            f"parallel.tp: no tp_plan splits or replicates {', '.join(missing)};"
            " declare their modules in the tp_plan of the block, or use parallel.tp=1"
        )


def style_of(how: str, size: int) -> ParallelStyle:
    """The style of a word of a plan on `size` ranks."""
    word, _, heads = how.partition(":")
    if word == "heads":
        return heads_style(int(heads), size)
    if word == "groups":
        return WholeParameters() if int(heads) < size else OwnParts("outputs")
    style: ParallelStyle = STYLES[word]()
    return style


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply the `tp_plan` of every module that has one, over the 1-D `mesh`.

    This comes before anything else touches the model: compile and FSDP2 must see split modules.
    Also sets the model's `vocab_part` and `head_share`; reads `config.padded_vocab_size`.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    for owner in list(model.modules()):
        # A pipeline stage has only some of the modules that the plan names.
        plan: dict[str, str] = getattr(owner, "tp_plan", {})
        present = dict(owner.named_modules())
        styles: dict[str, ParallelStyle] = {
            name: style_of(how, mesh.size())
            for name, how in plan.items()
            if present.get(name) is not None
        }
        if styles:
            # src_data_rank=None: weights are still on the meta device, nothing to broadcast.
            parallelize_module(owner, mesh, styles, src_data_rank=None)
    require_split(model)
    for name in frozen:
        # torch 2.13: SequenceParallel makes parameters that train out of any.
        model.get_parameter(name).requires_grad_(False)
    count: int = model.config.padded_vocab_size  # type: ignore[union-attr, assignment]
    first = count // mesh.size() * mesh.get_local_rank()
    total = partial(sum_over, group=mesh.get_group())
    model.head_share = (mesh.get_local_rank(), mesh.size(), total)  # type: ignore[assignment]
    model.vocab_part = VocabPart(first, count, mesh.get_group())  # type: ignore[assignment]
