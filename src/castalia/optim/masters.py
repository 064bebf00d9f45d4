"""What the optimizers update: a model's own parameters, fp32 masters of bf16 parameters, or bf16
parameters whose updates are rounded stochastically.

Every optimizer computes in fp32 on fp32 gradients. Where these exist whole, it steps over all
parameters at once; otherwise over one at a time, whose fp32 copies live as long as its step.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from castalia.distributed.boxes import Box, local_boxes
from castalia.models.parts.dropout import GOLDEN, WORD, mix

CHUNK = 1 << 20
"""Numbers that are rounded at a time: the words they draw take 8 bytes each."""


class Storage(NamedTuple):
    """How the parameters of a run are kept."""

    parameters: str = "fp32"
    """fp32, bf16 with fp32 masters in the optimizer, or bf16_stochastic without masters."""
    gradients: str = "fp32"
    """Dtype in which the gradients of micro-batches add up: fp32 or bf16."""
    seed: int = 0
    """Of the draws of stochastic rounding."""


class Weights:
    """The trained weights of a model as its optimizers see them: here its own parameters, in
    fp32."""

    def __init__(self, model: nn.Module, storage: Storage) -> None:
        self.storage = storage
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        """The model's parameters that train, by name; their gradients arrive here."""
        self.targets = dict(self.parameters)
        """What the optimizers update and keep state for, by the same names."""

    def accumulate_in(self, name: str) -> None:
        """Let autograd add up the gradients of micro-batches in this dtype."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        for parameter in self.parameters.values():
            # FSDP2 adds up what it shards by its own policy.
            if not isinstance(parameter, DTensor) and parameter.dtype != dtype:
                parameter.grad_dtype = dtype

    def masters(self) -> dict[str, Tensor]:
        """Names of parameters -> fp32 weights that stand for them in checkpoints."""
        return {}

    def loaded(self) -> None:
        """Follow weights that a checkpoint has filled."""
        return

    def zero_grad(self) -> None:
        """Drop all gradients, and their memory with them."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, optimizers: Collection[Optimizer], updates: int) -> None:
        """One update by every optimizer; `updates` were made before."""
        if self.is_wide():
            self.step_together(optimizers)
            return
        names = {id(target): name for name, target in self.targets.items()}

        def gradient(target: nn.Parameter) -> Tensor | None:
            return self.parameters[names[id(target)]].grad

        def updated(target: nn.Parameter, wide: Tensor) -> None:
            self.updated(names[id(target)], wide, updates)

        for optimizer in optimizers:
            step_apart(optimizer, gradient, updated)

    def is_wide(self) -> bool:
        """Whether the gradients have the dtype of what is updated, fp32."""
        return all(
            parameter.grad is None or parameter.grad.dtype == self.targets[name].dtype
            for name, parameter in self.parameters.items()
        )

    def step_together(self, optimizers: Collection[Optimizer]) -> None:
        """One update of all targets."""
        for optimizer in optimizers:
            optimizer.step()

    def updated(self, name: str, wide: Tensor, updates: int) -> None:
        """Take over one weight after its update; `wide` shares the memory of an fp32 parameter."""
        return


class MasterWeights(Weights):
    """fp32 masters, of which the model's parameters are copies in bf16.

    Takes the model's fp32 weights as masters, so that no bit of a start is lost, and leaves bf16
    copies in the model. Frozen parameters become bf16 as well, without a master.
    Source  Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.
    """

    def __init__(self, model: nn.Module, storage: Storage) -> None:
        super().__init__(model, storage)
        self.targets = {
            name: nn.Parameter(parameter.detach()) for name, parameter in self.parameters.items()
        }
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)

    def masters(self) -> dict[str, Tensor]:
        """The masters: a checkpoint holds them in place of their bf16 copies."""
        return {name: target.detach() for name, target in self.targets.items()}

    @torch.no_grad()
    def loaded(self) -> None:
        """Round the masters into the model."""
        for name, target in self.targets.items():
            self.updated(name, target, 0)

    def step_together(self, optimizers: Collection[Optimizer]) -> None:
        """Update the masters with the model's fp32 gradients, then round them into the model."""
        for name, target in self.targets.items():
            target.grad = self.parameters[name].grad
        super().step_together(optimizers)
        for target in self.targets.values():
            # A second reference would keep the gradients alive through the next forward pass.
            target.grad = None
        self.loaded()

    @torch.no_grad()
    def updated(self, name: str, wide: Tensor, updates: int) -> None:
        """Round one master to nearest into the model; `wide` shares its memory."""
        self.parameters[name].copy_(wide)


class RoundedWeights(Weights):
    """bf16 parameters without masters, rounded up or down at random after each update.

    An update below half of bf16's resolution would be lost in rounding to nearest. Rounded up with
    the probability of what is cut off, it counts in expectation.
    Source  Gupta et al. 2015, arXiv:1502.02551, section 3; Zamirai et al. 2020, arXiv:2010.06192.
    """

    def __init__(self, model: nn.Module, storage: Storage) -> None:
        super().__init__(model, storage)
        narrow = [p for p in self.parameters.values() if p.dtype != torch.bfloat16]
        assert not narrow, "stochastic rounding is for parameters that are bf16 already"

    def is_wide(self) -> bool:
        """Never: the fp32 copies of all parameters together would be as large as masters."""
        return False

    @torch.no_grad()
    def updated(self, name: str, wide: Tensor, updates: int) -> None:
        """Round one parameter; what is drawn depends on seed, update, name and place alone."""
        round_stochastically(wide, self.parameters[name], f"{self.storage.seed}:{updates}:{name}")


KINDS: dict[str, type[Weights]] = {
    "fp32": Weights,
    "bf16": MasterWeights,
    "bf16_stochastic": RoundedWeights,
}


def weights_of(model: nn.Module, storage: Storage) -> Weights:
    """The trained weights of a model whose parameters are kept as `storage` says."""
    weights = KINDS[storage.parameters](model, storage)
    weights.accumulate_in(storage.gradients)
    return weights


def step_apart(
    optimizer: Optimizer,
    gradient: Callable[[nn.Parameter], Tensor | None],
    updated: Callable[[nn.Parameter, Tensor], None],
) -> None:
    """One step of `optimizer`, parameter by parameter, in fp32.

    gradient  of a parameter, in any dtype; None leaves it out.
    updated   called with each parameter and its fp32 weight after the update, which shares the
              memory of a parameter in fp32.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            after = settings
            for target in group["params"]:
                arrived = gradient(target)
                if arrived is None:
                    continue
                wide = nn.Parameter(target.detach().float())
                wide.grad = arrived.float()
                # The same mapping under another key: the optimizer finds and fills its state.
                optimizer.state[wide] = optimizer.state[target]
                # Each parameter starts from the counters that the group had before this step, as
                # all do when they step together.
                after = {**settings, "params": [wide]}
                optimizer.param_groups = [after]
                optimizer.step()
                del optimizer.state[wide]
                updated(target, wide.detach())
            group.update((name, value) for name, value in after.items() if name != "params")
    finally:
        optimizer.param_groups = groups


def round_stochastically(wide: Tensor, out: Tensor, key: str) -> None:
    """Round fp32 numbers to bf16 at random, up or down in proportion to the distance.

    Shapes  wide float32 and out bfloat16 of one shape, plain or laid out alike over ranks.
    key     what is drawn is a function of it and of each number's place in the whole tensor, so
            that every layout draws the same.
    """
    low, high = words_of(key)
    source = wide.to_local() if isinstance(wide, DTensor) else wide
    target = out.to_local() if isinstance(out, DTensor) else out
    for box, place in local_boxes(out):
        for part, numbers in places(box, tuple(out.shape), source.device):
            lines = part.slices_from(shifted(box, place))
            # A bf16 number is the upper half of an fp32 one: a carry out of the lower half rounds
            # its magnitude up.
            word = mix(low + numbers * GOLDEN & WORD, high ^ numbers >> 32) >> 16
            piece = source[lines]
            bits = piece.contiguous().view(torch.int32) + word.to(torch.int32) & -(1 << 16)
            rounded = torch.where(piece.isfinite(), bits.view(torch.float32), piece)
            target[lines].copy_(rounded)


def words_of(key: str) -> tuple[int, int]:
    """Two 32-bit words out of a text."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def shifted(box: Box, place: Box) -> tuple[int, ...]:
    """The element of the whole tensor that would lie first in the local tensor."""
    return tuple(first - local for first, local in zip(box.offset, place.offset, strict=True))


def places(box: Box, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[Box, Tensor]]:
    """Parts of a box of about CHUNK numbers, and the place of each number in a tensor of `shape`,
    counted through its rows."""
    if not shape:
        yield box, torch.zeros((), dtype=torch.int64, device=device)
        return
    line = max(1, box.volume // max(1, box.shape[0]))
    step = max(1, CHUNK // line)
    for begin in range(0, box.shape[0], step):
        offset = (box.offset[0] + begin, *box.offset[1:])
        part = Box(offset, (min(step, box.shape[0] - begin), *box.shape[1:]))
        numbers = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
        for dim, (first, size) in enumerate(zip(part.offset, part.shape, strict=True)):
            ranks = torch.arange(first, first + size, device=device)
            numbers = numbers * shape[dim] + ranks.view(-1, *(1,) * (len(shape) - dim - 1))
        yield part, numbers
