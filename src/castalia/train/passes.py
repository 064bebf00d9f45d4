"""Forward and backward passes of a step's micro-batches, on one model or on pipeline stages."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from castalia.adapters import adapter_of
from castalia.data import Batch
from castalia.data.step_reader import PADDING_ROW
from castalia.distributed import World
from castalia.distributed.gradients import gradient_norm, sum_plain_gradients
from castalia.distributed.pipeline import Pipeline, Stages
from castalia.losses import Loss, LossOut, Scored
from castalia.models.families import family_of
from castalia.models.offload import Offload
from castalia.models.parts.dropout import row_draws
from castalia.monitor.parts import BACKWARD, FORWARD, LOSS, NORM, part
from castalia.runs.config import RunConfig
from castalia.train.balance import Balance
from castalia.train.precision import arithmetic
from castalia.train.totals import PassSums

Progressed = Callable[[], None]
"""Called at each pass: the watchdog's limit holds for one pass and not for a whole step."""


class FillsReference(Protocol):
    """A reference model beside the one that trains."""

    def fill(self, batch: Batch) -> Batch:
        """The batch with `reference`."""


class Passes:
    """The passes of a whole model: one micro-batch after the other."""

    reads = True
    """Whether this rank needs rows."""
    scores = True
    """Whether this rank runs the loss."""

    def __init__(
        self, model: Any, loss: Loss, config: RunConfig, world: World, progressed: Progressed
    ) -> None:
        self.model = model
        self.loss = loss
        self.world = world
        self.progressed = progressed
        self.precision = config.precision
        self.compiled = config.train.compile
        self.seed = config.seed
        self.drops = config.model.drops or adapter_of(config.adapter).drops(config.adapter)
        self.multiple = trimmed_multiple(config, world)
        self.balance = Balance(model, config.model, world)
        # See castalia.telemetry.step_passes.
        self.after_first: Callable[[], None] | None = None
        self.reference: FillsReference | None = None
        self.offload: Offload | None = None
        # On a CPU activations are in its memory already; see the notes at the start.
        if config.train.offload_activations and world.device.type == "cuda":
            self.offload = Offload(model, world.device)

    @property
    def counts(self) -> bool:
        """Whether this rank counts rows and targets; of the ranks with the same rows, one does."""
        return self.scores and self.world.coordinate("cp") == 0

    def set_shape(self, batch: int, length: int) -> None:
        """Called on all ranks before the passes of a step: rows, or pairs, of the whole batch, and
        tokens of a row, cp ranks' parts together."""

    def around(self) -> AbstractContextManager[None]:
        """Context of one forward pass."""
        self.progressed()
        context = arithmetic(self.precision, self.world.device)
        if self.offload is None or not torch.is_grad_enabled():
            return context
        return self.offload.around(context)

    def own_part(self, batch: Batch) -> Batch:
        """This rank's slice of the micro-batch: context parallelism splits the tokens of a row."""
        part = self.world.sequence
        if part is None:
            return batch
        return batch.of_tokens(part.own)

    def weights(self, micro_batches: Sequence[Batch]) -> list[float]:
        """The loss's weight of this rank's slice of each micro-batch, before any pass."""
        # A rank without the last stage has no loss, so its share of the denominator is nothing.
        if not self.scores:
            return []
        return [self.loss.weight(self.own_part(batch)) for batch in micro_batches]

    def total_weight(
        self, micro_batches: Sequence[Batch], weights: Sequence[float], loss_scale: float
    ) -> float:
        """The weight of all ranks' micro-batches together; also tells experts how many rows share
        their losses."""
        rows = 0
        if self.counts:
            rows = sum(int((batch.index != PADDING_ROW).sum()) for batch in micro_batches)
        numbers = torch.tensor([sum(weights), rows], dtype=torch.float64, device=self.world.device)
        weight, rows = self.world.sum(numbers).tolist()
        self.balance.set_scale(loss_scale / max(1.0, rows))
        return float(weight)

    def on_device(self, batch: Batch) -> Batch:
        """This rank's slice of the micro-batch, on its device."""
        if self.multiple is not None:
            batch = batch.trimmed(self.multiple)
        return self.own_part(batch).to(self.world.device)

    def draws(self, batch: Batch, step: int | None) -> Tensor | None:
        """What dropout draws from in a training step; None where nothing is dropped."""
        if step is None or not self.drops:
            return None
        return row_draws(self.seed, step, batch.index)

    def new_sums(self) -> PassSums:
        """Sums without a micro-batch."""
        return PassSums(self.loss, self.world.device, self.balance.size)

    def run_loss(self, batch: Batch, step: int | None = None) -> LossOut:
        """Forward pass and loss of one micro-batch, of a training step or of none."""
        if self.reference is not None:
            batch = self.reference.fill(batch)
        draws = self.draws(batch, step)
        with self.around():
            scored = Scored.by(self.model, batch, compiled=self.compiled, draws=draws)
            with part(LOSS):
                return self.loss(scored, batch)

    def train(
        self, micro_batches: Sequence[Batch], weights: Sequence[float], factor: float, step: int
    ) -> PassSums:
        """Forward and backward: adds the gradient of `factor` times the summed loss."""
        sums = self.new_sums()
        for place, batch in enumerate(micro_batches):
            # Until the last one, gradients only add up locally.
            self.reduce_gradients_if(place == len(micro_batches) - 1)
            self.balance.set_padding(batch)
            with part(FORWARD):
                out = self.run_loss(self.on_device(batch), step)
            # Scaling the total here gives every gradient its final size: no second pass over them.
            with part(BACKWARD):
                (out.total * factor).backward()
            sums.add(out, weights[place])
            if self.after_first is not None:
                self.after_first()
        # FSDP reduces what it shards; a parameter that is whole on every rank is left to us.
        sum_plain_gradients(self.model, self.world)
        sums.experts += self.balance.take()
        return sums

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Batch], weights: Sequence[float]) -> PassSums:
        """Forward only."""
        sums = self.new_sums()
        for batch, weight in zip(micro_batches, weights, strict=True):
            sums.add(self.run_loss(self.on_device(batch)), weight)
        return sums

    def reduce_gradients_if(self, last: bool) -> None:
        """Reduce sharded gradients after the last micro-batch only: one reduction a step."""
        if self.world.size > 1:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a float32 scalar."""
        with part(NORM):
            return gradient_norm(self.model)


class PipelinedPasses(Passes):
    """The passes of the stages of a pipeline.

    The loss runs on the last stage, on hidden states that are detached from the pipeline. Its
    backward as far as these runs at once, so that the gradient of the head's matrix, as large as
    the matrix, is never kept for several micro-batches. The schedule differentiates
    <hidden, gradient> whenever it chooses; that scalar leads on to the stages before.
    """

    def __init__(
        self, model: Stages, loss: Loss, config: RunConfig, world: World, progressed: Progressed
    ) -> None:
        super().__init__(model, loss, config, world, progressed)
        self.config = config
        self.shape = (0, 0)
        self.set_shape(config.train.batch_size, config.data.seq_length)
        # The loss needs the labels, so the last stage reads rows as the first does.
        self.scores = self.pipeline.last is not None
        # Every stage needs the document boundaries where documents do not see each other.
        masked = config.data.document_mask is not None
        # Every stage needs the numbers of the rows, which decide what dropout drops.
        self.reads = self.pipeline.is_first or self.scores or masked or self.drops

    def set_shape(self, batch: int, length: int) -> None:
        """Make the pipeline anew for another shape: its buffers and its number of micro-batches
        are fixed."""
        if self.shape == (batch, length):
            return
        config = self.config
        world = self.world
        self.shape = (batch, length)
        places = batch // world.degrees.dp
        rows = places * config.rows_per_place
        micro = (config.train.micro_batch_size or places) * config.rows_at_once
        own = length // world.degrees.cp
        if world.sequence is None:
            positions = torch.arange(own)[None]
        else:
            positions = world.sequence.positions(own)
        # All micro-batches at once: the schedule cuts its arguments itself.
        self.places = positions.to(world.device).expand(rows, own)
        self.pipeline = Pipeline(
            self.model,
            world,
            config.parallel,
            count=rows // micro,
            tokens=(micro, own),
            # Under tensor parallelism stages hand on T / tp tokens of each row.
            hidden=(micro, own // world.degrees.tp, config.model.hidden_size),
            carried=family_of(config.model).carries(config.model),
            around=self.around,
        )

    def run_loss_on(self, hidden: Tensor, batch: Batch) -> LossOut:
        """The loss of one micro-batch on the last stage's output."""
        with part(LOSS), self.around():
            return self.loss(Scored(hidden, self.pipeline.last, compiled=self.compiled), batch)

    def train(
        self, micro_batches: Sequence[Batch], weights: Sequence[float], factor: float, step: int
    ) -> PassSums:
        """Forward and backward by the schedule; the last stage's rank fills the sums."""
        sums = self.new_sums()
        batches = [self.on_device(batch) for batch in micro_batches]

        def finish(place: int, hidden: Tensor) -> Tensor:
            # Cut here: the graph of the loss ends at this leaf and is freed in this call.
            leaf = hidden.detach().requires_grad_()
            out = self.run_loss_on(leaf, batches[place])
            (out.total * factor).backward()
            sums.add(out, weights[place])
            # Its derivative by `hidden` is leaf.grad, which is all that earlier stages need.
            return (hidden * cast(Tensor, leaf.grad)).sum()

        self.pipeline.train(*self.arguments(batches, step), finish)
        sum_plain_gradients(self.model, self.world)
        sums.experts += self.balance.take()
        return sums

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Batch], weights: Sequence[float]) -> PassSums:
        """Forward only."""
        sums = self.new_sums()
        batches = [self.on_device(batch) for batch in micro_batches]

        def finish(place: int, hidden: Tensor) -> None:
            sums.add(self.run_loss_on(hidden, batches[place]), weights[place])

        self.pipeline.run(*self.arguments(batches), finish)
        return sums

    def arguments(
        self, batches: list[Batch], step: int | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Tokens of all micro-batches, and the tensors that every stage gets beside its input."""
        keywords = {}
        if self.world.degrees.tp > 1:
            # A later stage sees T / tp tokens only and cannot count their places itself.
            keywords["positions"] = self.places
        for name in ("positions", "segments"):
            values = [getattr(batch, name) for batch in batches]
            if values and values[0] is not None:
                keywords[name] = torch.cat(values)
        draws = [self.draws(batch, step) for batch in batches]
        if draws and draws[0] is not None:
            keywords["draws"] = torch.cat(cast(list[Tensor], draws))
        tokens = torch.cat([batch.tokens for batch in batches]) if batches else None
        return tokens, keywords

    def gradient_norm(self) -> Tensor:
        """Over all stages. A parameter on two stages counts once."""
        with part(NORM):
            return gradient_norm(self.model, without=self.model.copies)


def trimmed_multiple(config: RunConfig, world: World) -> int | None:
    """What the length of trimmed rows is a multiple of; None where all rows keep their length."""
    degrees = world.degrees
    # A pipeline's buffers have one shape, ranks share the tokens of a row, a compiled model is
    # compiled anew for each length, the bits of dropout depend on the length, and sparse attention
    # needs whole blocks.
    if degrees.pp > 1 or degrees.cp > 1 or config.train.compile or config.model.drops:
        return None
    # Its kernel is compiled for each length, too.
    if config.train.document_attention == "flex":
        return None
    # Experts are balanced over all tokens of a row, whose padding another micro-batch would cut
    # elsewhere.
    if config.model.expert_layers:
        return None
    if set(getattr(config.model, "layer_kinds", ())) - {"global", "sliding"}:
        return None
    return math.lcm(8, degrees.tp)


def make_passes(
    model: Any, loss: Loss, config: RunConfig, world: World, progressed: Progressed
) -> Passes:
    """The passes that fit the model's layout."""
    kind = PipelinedPasses if isinstance(model, Stages) else Passes
    return kind(model, loss, config, world, progressed)
