"""The statistics of a run, put together from its config; see castalia.telemetry."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from castalia.data import Batch
from castalia.telemetry.activations import Activations
from castalia.telemetry.attention_logits import AttentionLogits
from castalia.telemetry.collectives import Collectives
from castalia.telemetry.groups import Groups
from castalia.telemetry.noise_scale import NoiseScale
from castalia.telemetry.norms import (
    GradientNorms,
    OfTensors,
    StateNorms,
    UpdateNorms,
    WeightNorms,
    WeightStatistics,
    ZeroGradients,
)
from castalia.telemetry.statistic import PassesOf, Statistic, Telemetry
from castalia.telemetry.tensors import Grouped
from castalia.telemetry.times import Times
from castalia.train.rate import ModelRate

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer

OF_TENSORS: dict[str, type[OfTensors]] = {
    "gradient_norms": GradientNorms,
    "weight_norms": WeightNorms,
    "update_norms": UpdateNorms,
    "state_norms": StateNorms,
    "zero_gradients": ZeroGradients,
    "weight_statistics": WeightStatistics,
}
"""Statistics of gradients, weights and states by their names in `monitor:`, without `_every`."""


def make_telemetry(trainer: "Trainer") -> Telemetry:
    """The statistics that `monitor:` asks for; also tells the clock of the trainer what to time."""
    config = trainer.config
    asked = config.monitor
    model = trainer.model
    world = trainer.world
    trainer.clock.rate = ModelRate(config, world)
    trainer.clock.times = Times(asked.times_every, world.device)
    statistics: dict[str, Statistic] = {}
    groups = Groups(config.model.num_layers, asked.norm_groups)
    grouped = Grouped(groups, world, model.copies)
    for name, kind in OF_TENSORS.items():
        every = getattr(asked, f"{name}_every")
        if every is not None:
            statistics[name] = kind(every, grouped, trainer.updater)
    if asked.activations_every is not None:
        statistics["activations"] = Activations(asked.activations_every, model, world, config.model)
    if asked.attention_logits_every is not None:
        statistics["attention_logits"] = AttentionLogits(
            asked.attention_logits_every, model, world, config.model.num_layers
        )
    if asked.collectives_every is not None:
        statistics["collectives"] = Collectives(asked.collectives_every, world)
    if asked.noise_scale_every is not None:
        statistics["noise_scale"] = NoiseScale(
            asked.noise_scale_every,
            asked.noise_scale_decay,
            trainer.passes,
            trainer.updater,
            single=world.size == 1,
        )
    eager = None
    if config.train.compile:

        def eager(batches: Sequence[Batch]) -> None:
            run_eagerly(trainer, batches)

    return Telemetry(statistics, world, eager)


def run_eagerly(trainer: "Trainer", batches: Sequence[Batch]) -> None:
    """Pass the first micro-batch forward outside of torch.compile, without gradients and dropout.

    A pass of the step itself cannot run so: its rounding is not that of compiled code, and the
    weights would be others than without statistics.
    """
    # A pipeline's schedule has a fixed number of micro-batches.
    chosen = batches if trainer.world.degrees.pp > 1 else batches[:1]
    with torch.compiler.set_stance("force_eager"):
        trainer.passes.run(chosen, trainer.passes.weights(chosen))


def measured(trainer: "Trainer", batches: Sequence[Batch]) -> PassesOf:
    """The passes of the coming step."""
    return PassesOf(trainer.progress.step + 1, batches, trainer.scale.value)
