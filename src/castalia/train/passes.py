"""Forward and backward passes of a step's micro-batches, on one model or on the stages of a pipeline."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from castalia.core.errors import ConfigError
from castalia.cost.divisibility import micro_batch_problem
from castalia.data import Batch
from castalia.data.step_reader import check_batch
from castalia.distributed import World, check_layout, initialize, parallelize
from castalia.distributed.gradients import gradient_norm, sum_plain_gradients
from castalia.distributed.pipeline import Pipeline, Stages, stage_numbers
from castalia.models import Decoder
from castalia.models.init import init_parameter
from castalia.models.stages import split
from castalia.train.config import RunConfig
from castalia.train.loss import Loss, LossOut
from castalia.train.optimizers import Rules
from castalia.train.optimizers.updater import freeze
from castalia.train.precision import arithmetic

Beat = Callable[[str], None]
"""Tells the watchdog what begins."""


def check_processes(config: RunConfig, size: int) -> None:
    """Refuse a layout or a batch that does not divide over `size` processes, before any process group starts.

    Raises  ConfigError.
    """
    check_layout(config.parallel, size)
    dp = config.parallel.degrees(size).dp
    rows, micro = config.train.batch_size // dp, config.train.micro_batch_size
    if not config.parallel.uneven:
        check_batch(config.train.batch_size, micro or max(1, rows), dp)
    if problem := micro_batch_problem(config.parallel, rows, micro or rows):
        raise ConfigError(problem)


def build_model(config: RunConfig, world: World, rules: Rules) -> Decoder | Stages:
    """The model of a run, laid out and with its start weights; its stages on this process when there is a pipeline."""
    layout = config.parallel
    parts = split(config.model.num_layers, layout.stages)
    with torch.device("meta"):
        rules.require_matches(name for name, _ in Decoder(config.model).named_parameters())
    stages = []
    for number in stage_numbers(layout, world.coordinate("pp")):
        with torch.device("meta"):
            stage = Decoder(config.model, parts[number])
        stage.recompute = config.train.recompute
        freeze(stage, rules)
        stages.append(parallelize(stage, world, layout, compiled=config.train.compile))
    model = stages[0] if layout.pp == 1 else Stages(stages)
    initialize(model, lambda name, shape: init_parameter(name, shape, config.model, config.seed))
    return model


class Tally:
    """Sums over micro-batches: `loss` in nats, float64; `per_source` (K, 2), loss and targets by source."""

    def __init__(self, sources: int, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.per_source = torch.zeros(sources, 2, dtype=torch.float64, device=device)

    def add(self, out: LossOut) -> None:
        """Count one micro-batch."""
        self.loss += out.total.detach()
        self.per_source += out.per_source


class Passes:
    """The passes of a whole model: one micro-batch after the other."""

    reads = True
    """Whether this process needs rows."""

    def __init__(
        self, model: Any, loss: Loss, sources: int, config: RunConfig, world: World, beat: Beat
    ) -> None:
        self.model, self.loss, self.sources, self.world, self.beat = (
            model,
            loss,
            sources,
            world,
            beat,
        )
        self.precision, self.doing = config.precision, "forward and backward"
        self.counts = world.coordinate("cp") == 0
        """Whether this process counts rows and targets; of those that run the same rows, one does."""

    def around(self) -> AbstractContextManager[None]:
        """Context of one forward pass; the watchdog hears of it."""
        self.beat(self.doing)
        return arithmetic(self.precision, self.world.device)

    def own_part(self, batch: Batch) -> Batch:
        """The tokens of a micro-batch that this process runs, on its device."""
        part = self.world.sequence
        return (batch if part is None else batch.of_tokens(part.own)).to(self.world.device)

    def tally(self, doing: str) -> Tally:
        """Nothing counted yet; `doing` is what the watchdog hears."""
        self.doing = doing
        return Tally(self.sources, self.world.device)

    def train(self, micro_batches: list[Batch], factor: float) -> Tally:
        """Forward and backward: the gradients of `factor` times the summed loss are added to the model's."""
        tally = self.tally("forward and backward")
        for place, batch in enumerate(micro_batches):
            self.reduce_gradients_if(place == len(micro_batches) - 1)
            with self.around():
                out = self.loss(self.model, self.own_part(batch))
            (out.total * factor).backward()
            tally.add(out)
        sum_plain_gradients(self.model, self.world)
        return tally

    @torch.no_grad()
    def run(self, micro_batches: list[Batch]) -> Tally:
        """Forward only."""
        tally = self.tally("validation")
        for batch in micro_batches:
            with self.around():
                tally.add(self.loss(self.model, self.own_part(batch)))
        return tally

    def reduce_gradients_if(self, last: bool) -> None:
        """With sharded weights, reduce gradients only after the last micro-batch."""
        if self.world.size > 1:
            cast(FSDPModule, self.model).set_requires_gradient_sync(last)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a float32 scalar."""
        return gradient_norm(self.model)


class PipelinedPasses(Passes):
    """The passes of the stages of a pipeline.

    The loss sees the last stage as a model whose hidden states are there already. Its backward as far as these runs
    at once, so that the gradient of the head's matrix, as large as the matrix, is never kept for several micro-batches;
    the schedule is given <hidden, gradient> to differentiate, which leads on from there whenever it chooses.
    """

    def __init__(
        self, model: Stages, loss: Loss, sources: int, config: RunConfig, world: World, beat: Beat
    ) -> None:
        super().__init__(model, loss, sources, config, world, beat)
        rows = config.train.batch_size // world.degrees.dp
        micro, length = (
            config.train.micro_batch_size or rows,
            config.data.seq_length // world.degrees.cp,
        )
        places = (
            torch.arange(length)[None]
            if world.sequence is None
            else world.sequence.positions(length)
        )
        self.places = places.to(world.device).expand(rows, length)
        self.pipeline = Pipeline(
            model,
            world,
            config.parallel,
            count=rows // micro,
            tokens=(micro, length),
            hidden=(micro, length // world.degrees.tp, config.model.hidden_size),
            around=self.around,
        )
        # Where documents stand by themselves in a row, every stage needs their places.
        self.reads = (
            self.pipeline.is_first
            or self.pipeline.last is not None
            or config.data.document_mask is not None
        )
        self.counts = self.counts and self.pipeline.last is not None

    def train(self, micro_batches: list[Batch], factor: float) -> Tally:
        """Forward and backward by the schedule; each process counts what its last stage gives."""
        tally, batches = (
            self.tally("forward and backward"),
            [self.own_part(batch) for batch in micro_batches],
        )

        def finish(place: int, hidden: Tensor) -> Tensor:
            leaf = hidden.detach().requires_grad_()
            with self.around():
                out = self.loss(cast(Decoder, Finished(self.pipeline.last, leaf)), batches[place])
            (out.total * factor).backward()
            tally.add(out)
            return (hidden * cast(Tensor, leaf.grad)).sum()

        self.pipeline.train(*self.arguments(batches), finish)
        sum_plain_gradients(self.model, self.world)
        return tally

    @torch.no_grad()
    def run(self, micro_batches: list[Batch]) -> Tally:
        """Forward only."""
        tally, batches = self.tally("validation"), [self.own_part(batch) for batch in micro_batches]

        def finish(place: int, hidden: Tensor) -> None:
            with self.around():
                tally.add(
                    self.loss(cast(Decoder, Finished(self.pipeline.last, hidden)), batches[place])
                )

        self.pipeline.run(*self.arguments(batches), finish)
        return tally

    def arguments(self, batches: list[Batch]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Tokens of all micro-batches, and what goes to every stage beside the hidden states.

        Under tensor parallelism these hold the places of the tokens, for a later stage sees a part of the tokens only.
        """
        keywords = {"positions": self.places} if self.world.degrees.tp > 1 else {}
        for name in ("positions", "segments"):
            values = [getattr(batch, name) for batch in batches]
            if values and values[0] is not None:
                keywords[name] = torch.cat(values)
        return torch.cat([batch.tokens for batch in batches]) if batches else None, keywords

    def gradient_norm(self) -> Tensor:
        """Over all stages; what two stages hold counts once."""
        return gradient_norm(self.model, without=self.model.copies)


class Finished:
    """A last stage and the hidden states that it gave, in the place of a model that would make them."""

    def __init__(self, stage: Decoder, hidden: Tensor) -> None:
        self.stage, self.hidden = stage, hidden

    def __call__(self, tokens: Tensor, **_: Tensor | None) -> Tensor:
        """The hidden states of `tokens` (B, T, C)."""
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        """All else is the stage's: `head`, `head_weight`, `config`."""
        return getattr(self.stage, name)


def make_passes(
    model: Any, loss: Loss, sources: int, config: RunConfig, world: World, beat: Beat
) -> Passes:
    """The passes that fit the model's layout."""
    kind = PipelinedPasses if isinstance(model, Stages) else Passes
    return kind(model, loss, sources, config, world, beat)
