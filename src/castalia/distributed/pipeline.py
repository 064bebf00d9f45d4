"""Pipeline parallelism: each rank holds stages of the model and passes micro-batches on.

The schedules are torch's own.

Source  1F1B and its interleaved form, Narayanan et al. 2021, arXiv:2104.04473; GPipe, Huang et al.
        2018, arXiv:1811.06965; zero bubble and its V, Qi et al. 2023, arXiv:2401.10241.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from castalia.distributed.config import ParallelConfig
from castalia.distributed.world import World
from castalia.monitor.parts import BACKWARD, FORWARD, part

ONE_STAGE = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
"""Schedules of one stage per rank."""
MORE_STAGES = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}
Around = Callable[[], AbstractContextManager[None]]
Keywords = Mapping[str, Tensor]


def stage_numbers(config: ParallelConfig, place: int) -> list[int]:
    """The stages on the rank at coordinate `place` of the pipeline: every pp-th one, or, in a V,
    one on each arm."""
    if config.schedule == "zero_bubble_v":
        return [place, config.stages - 1 - place]
    return list(range(place, config.stages, config.pp))


class Stages(nn.ModuleList):
    """The stages of one model on this rank. Parameters keep the names of the whole model.

    A stage declares `span`, `tied` (parameters on both the first and the last stage) and `copies`.
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of all stages, without the stage numbers that ModuleList puts before names."""
        for stage in self:
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """States of all stages, under the names of the whole model."""
        return {
            name: value
            for stage in self
            for name, value in stage.state_dict(*args, **kwargs).items()
        }

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the parameters on this rank that are copies of another stage's."""
        return tuple(name for stage in self for name in stage.copies)  # type: ignore[union-attr]


class Stage(PipelineStage):
    """One stage, its forward pass inside the context that `around` makes (autocast, watchdog)."""

    around: Around

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of one micro-batch; the backward runs outside `around`, as autocast asks."""
        with part(f"{FORWARD} stage {self.stage_index}"), self.around():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Backward pass of one micro-batch, or its gradients by the input alone."""
        with part(f"{BACKWARD} stage {self.stage_index}"):
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """The gradients by the weights, where a schedule computes them apart."""
        with part(f"{BACKWARD} weights stage {self.stage_index}"):
            return super().backward_weight_one_chunk(*args, **kwargs)


class Pipeline:
    """The stages of this rank among those of the other ranks.

    count   micro-batches in a step.
    tokens  shape (B, T) of a micro-batch on this rank.
    hidden  shape (B, T, C) of the float32 hidden states between stages; tensor parallelism divides
            T by tp.
    carried numbers of each token that follow the C channels between stages.
    around  makes the context of a forward pass.
    """

    def __init__(
        self,
        stages: Stages,
        world: World,
        config: ParallelConfig,
        *,
        count: int,
        tokens: tuple[int, int],
        hidden: tuple[int, int, int],
        carried: int = 0,
        around: Around,
    ) -> None:
        assert world.mesh is not None
        self.count = count
        self.device = world.device
        self.owner = {
            number: place for place in range(config.pp) for number in stage_numbers(config, place)
        }
        self.group = world.mesh["pp"].get_group()
        self.around = around
        self.out = torch.empty(hidden, device="meta", requires_grad=True)
        between = (*hidden[:-1], hidden[-1] + carried)
        self.hidden = torch.empty(between, device="meta", requires_grad=True)
        numbers = stage_numbers(config, world.coordinate("pp"))
        self.stages: dict[int, Any] = dict(zip(numbers, stages, strict=True))
        self.schedule = self.make_schedule(
            config, torch.empty(tokens, dtype=torch.int64, device="meta")
        )

    def make_schedule(self, config: ParallelConfig, tokens: Tensor) -> Any:
        """torch's schedule over torch's stages. Shapes are given: inferring them would run a
        pass."""
        wrapped = []
        for number, stage in self.stages.items():
            inputs = tokens if stage.span.first else self.hidden
            one = Stage(
                stage,
                number,
                config.stages,
                self.device,
                input_args=inputs,
                output_args=self.out if stage.span.last else self.hidden,
                group=self.group,
            )
            one.around = self.around
            wrapped.append(one)
        # scale_grads=False: the loss is a sum with its own denominator, not a mean over
        # micro-batches.
        if config.schedule in ONE_STAGE:
            return ONE_STAGE[config.schedule](
                wrapped[0], self.count, loss_fn=self.call_finish, scale_grads=False
            )
        return MORE_STAGES[config.schedule](
            wrapped,  # type: ignore[arg-type]
            self.count,
            loss_fn=self.call_finish,
            scale_grads=False,
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank holds the first stage."""
        return 0 in self.stages

    @property
    def last(self) -> Any:
        """The last stage; None on ranks that do not hold it."""
        return next((stage for stage in self.stages.values() if stage.span.last), None)

    def train(
        self, tokens: Tensor | None, keywords: Keywords, finish: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Forward and backward of all micro-batches; gradients accumulate in the stages.

        tokens    (count * B, T) on the rank with the first stage, else None.
        keywords  tensors (count * B, ...) that every stage gets, by the names of its arguments.
        finish    index of the micro-batch, hidden states (B, T, C) -> scalar to differentiate;
                  called on the rank with the last stage.
        """
        # The target of micro-batch i is its index i: `finish` finds labels and weights by it.
        self.finish = finish
        places = torch.arange(self.count) if self.last is not None else None
        inputs = (tokens,) if self.is_first else ()
        self.schedule.step(*inputs, target=places, return_outputs=False, **keywords)
        self.add_up_tied()

    def call_finish(self, hidden: Tensor, place: Tensor) -> Tensor:
        """The schedule's loss function; its target is the index of the micro-batch."""
        return self.finish(int(place), hidden)

    @torch.no_grad()
    def run(
        self, tokens: Tensor | None, keywords: Keywords, finish: Callable[[int, Tensor], Any]
    ) -> None:
        """Forward pass of all micro-batches, stage by stage; arguments as in `train`."""
        chunks = [
            {name: value.chunk(self.count)[n] for name, value in keywords.items()}
            for n in range(self.count)
        ]
        here = list(tokens.chunk(self.count)) if self.is_first and tokens is not None else []
        sent = []
        for number, stage in self.stages.items():
            came = here
            here = []
            for place in range(self.count):
                x = came[place] if came else self.receive(number - 1)
                with self.around():
                    x = stage(x, **chunks[place])
                if stage.span.last:
                    finish(place, x)
                elif number + 1 in self.stages:
                    here.append(x)
                else:
                    sent.append((self.send(x, number + 1), x))
        for work, _ in sent:
            work.wait()

    def send(self, x: Tensor, number: int) -> dist.Work:
        """Send hidden states to stage `number`; they must stay alive until the work is done."""
        work = dist.isend(x, group=self.group, group_dst=self.owner[number])
        assert work is not None
        return work

    def receive(self, number: int) -> Tensor:
        """Receive the next hidden states from stage `number`."""
        x = torch.empty(self.hidden.shape, device=self.device)
        dist.recv(x, group=self.group, group_src=self.owner[number])
        return x

    def add_up_tied(self) -> None:
        """Sum the gradients of a tied parameter over the first and the last stage.

        Both then make the same update, so that the two copies stay equal.
        """
        for stage in self.stages.values():
            for name in stage.tied:
                gradient = local(stage.get_parameter(name).grad)
                theirs = torch.empty_like(gradient)
                peer = self.owner[max(self.owner) if stage.span.first else 0]
                both = [(dist.isend, gradient), (dist.irecv, theirs)]
                # Both directions at once: a blocking send on each side would deadlock.
                works = dist.batch_isend_irecv(
                    [dist.P2POp(op, t, group=self.group, group_peer=peer) for op, t in both]
                )
                for work in works:
                    work.wait()
                gradient.add_(theirs)


def local(tensor: Any) -> Tensor:
    """This rank's shard of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
