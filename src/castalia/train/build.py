"""From a config to a model on its ranks: build on meta, parallelize, initialize."""

from collections.abc import Iterator
from contextlib import closing

import torch

from castalia.adapters import AdapterConfig, adapter_of
from castalia.adapters.adapting import adapt, start_over
from castalia.adapters.fp8 import require_fp8, to_fp8
from castalia.adapters.switch import remember
from castalia.core.errors import ConfigError
from castalia.cost.divisibility import micro_batch_problem
from castalia.data import Batch, RunRows, StepLoader
from castalia.data.loader import RowLookup
from castalia.data.served import ServedRows
from castalia.data.step_reader import check_batch
from castalia.distributed import World, check_layout, initialize, parallelize
from castalia.distributed.pipeline import Stages, stage_numbers
from castalia.models import Decoder
from castalia.models.config import TransformerConfig
from castalia.models.init import start_weights
from castalia.models.stages import split
from castalia.optim import OPTIMIZERS, OptimConfig, Rules
from castalia.optim.updater import freeze
from castalia.products import use_onednn
from castalia.runs.config import RunConfig
from castalia.runs.flex_trial import require_flex
from castalia.runs.machine_products import uses_onednn
from castalia.tokenizers.tokenizer import load_tokenizer
from castalia.train.precision import DTYPES, gather_policy
from castalia.train.start import StartWeights


def check_processes(config: RunConfig, size: int) -> None:
    """Refuse a layout or a batch that is not divisible over `size` ranks.

    Called before any process group starts, so that the error comes once and nothing hangs.
    Raises  ConfigError.
    """
    check_layout(config.parallel, size)
    if size > 1:
        check_optimizers(config.optim)
    dp = config.parallel.degrees(size).dp
    rows = config.train.batch_size // dp
    micro = config.train.micro_batch_size
    for size in config.train.batches.distinct():
        # With uneven shares a rank may have a row less, and fills it with padding.
        if not config.parallel.uneven:
            check_batch(size, micro or max(1, size // dp), dp)
    if problem := micro_batch_problem(config.parallel, rows, micro or rows):
        raise ConfigError(problem)


def check_optimizers(config: OptimConfig) -> None:
    """Refuse an optimizer that is right on one rank alone.

    Raises  ConfigError.
    """
    for kind in [config.kind, *(group.kind for group in config.groups if group.kind)]:
        if not OPTIMIZERS[kind].sharded:
            raise ConfigError(
                f"optimizer {kind} cannot take a sharded parameter: train on one rank, or choose"
                " another optim.kind"
            )


def build_model(
    config: RunConfig, world: World, rules: Rules, start: StartWeights | None = None
) -> Decoder | Stages:
    """The model of a run with its start weights, or the stages of a pipeline on this rank.

    `start` holds the weights of another model, where the run begins with those.
    Raises  ConfigError if a pattern of the optimizer or of train.frozen matches no parameter.
    """
    with torch.device("meta"):
        # Names of the whole model: a pattern may match parameters of another rank's stage only.
        whole = Decoder(config.model)
        if config.precision == "fp8":
            require_fp8(whole, config.fp8, world.device)
        whole = adapt(whole, config.adapter)
    if config.train.document_attention == "flex" and world.device.type == "cuda":
        assert isinstance(config.model, TransformerConfig)
        require_flex(config.model, world.device, DTYPES[config.precision])
    rules.require_matches(name for name, _ in whole.named_parameters())
    # On the meta device first: no rank ever holds the whole model.
    stages = []
    for stage in stages_on_meta(config, world):
        # Before FSDP, which groups parameters by whether they need a gradient.
        freeze(stage, rules)
        stages.append(
            parallelize(
                stage,
                world,
                config.parallel,
                compiled=config.train.compile,
                policy=gather_policy(config),
            )
        )
    model = stages[0] if config.parallel.pp == 1 else Stages(stages)
    # Each parameter is drawn from (seed, name) alone and cut to this rank's slice afterwards, so
    # the start weights are the same bits on every layout.
    draw = start_weights(config.model, config.start_seed)
    base = draw if start is None else start.over(draw)
    added = with_prompt_ids(config)
    initialize(model, start_over(base, added, config.model, config.start_seed))
    if adapter_of(config.adapter).in_place:
        remember(model, {name for name, p in model.named_parameters() if p.requires_grad})
    return model


def stages_on_meta(config: RunConfig, world: World) -> list[Decoder]:
    """This rank's stages as shapes without memory; a run without a pipeline has one stage."""
    parts = split(config.model.num_layers, config.parallel.stages)
    stages = []
    for number in stage_numbers(config.parallel, world.coordinate("pp")):
        with torch.device("meta"):
            stage = Decoder(config.model, parts[number])
            if config.precision == "fp8":
                # Before the adapter: its additions multiply in bf16, the base below them in fp8.
                to_fp8(stage, config.fp8, world.device)
            if uses_onednn(config, world.device):
                # Before the adapter, whose layers keep the product of the layers they are made of.
                use_onednn(stage)
            stage = adapt(stage, config.adapter)
            if config.train.parameters == "bf16_stochastic":
                # Before FSDP2, which shards parameters in the dtype that they have.
                stage.to(torch.bfloat16)
        # Before parallelize, which compiles the blocks as they then are.
        stage.recompute = config.train.recompute
        stage.flex = config.train.document_attention == "flex"
        stages.append(stage)
    return stages


def with_prompt_ids(config: RunConfig) -> AdapterConfig:
    """The adapter's section, the text that its prompt begins with as ids.

    Raises  ConfigError if there is no tokenizer, or the text has no token.
    """
    text = getattr(config.adapter, "init_string", None)
    if text is None:
        return config.adapter
    if config.data.tokenizer is None:
        raise ConfigError("adapter.init_string is text, and data.tokenizer is null; use init_ids")
    ids = load_tokenizer(config.data.tokenizer).encode(text)
    if not ids:
        raise ConfigError(f"adapter.init_string {text!r} has no token; leave it out to draw")
    return config.adapter.model_copy(update={"init_ids": ids, "init_string": None})


def with_room(config: RunConfig, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The micro-batches of each step, with the room in front that an adapter takes."""
    count = adapter_of(config.adapter).room(config.adapter)
    if not count:
        return batches
    return moved_behind(batches, count)


def moved_behind(batches: Iterator[list[Batch]], count: int) -> Iterator[list[Batch]]:
    """Each batch behind `count` places; closing it closes what it reads."""
    with closing(batches):  # type: ignore[type-var]
        for micro_batches in batches:
            yield [batch.behind(count) for batch in micro_batches]


def step_loader(
    config: RunConfig,
    world: World,
    run_rows: RunRows,
    rows: ServedRows,
    start_step: int,
    plans: Iterator[RowLookup | None] | None,
) -> StepLoader:
    """The loader of this rank's micro-batches of `rows`, the train or the valid ones of a run."""
    return StepLoader(
        rows,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=world.dp_rank,
        dp_world=world.degrees.dp,
        start_step=start_step,
        # The unpadded size: generation never picks the ids of padding.
        vocab_size=config.model.vocab_size,
        eod_id=run_rows.eod_id if config.data.eod_mask_loss else None,
        workers=config.data.workers,
        plans=plans,
        uneven=config.parallel.uneven,
        mask=run_rows.mask,
        # Validations have full batches from the first.
        ramp=config.train.batch_ramp if rows is run_rows.train else None,
        prompt_weight=getattr(config.loss, "prompt_weight", 0.0),
    )
