"""Every optimizer on parameters that ranks share: resumed from one rank, and back to it."""

import sys
from pathlib import Path
from typing import Any

import torch
from tests.seams.ranks import report
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from castalia.checkpoint import Store, load_into
from castalia.core.errors import ConfigError
from castalia.distributed import ParallelConfig, World
from castalia.distributed.layout import fill
from castalia.optim import Rules
from castalia.optim.config import member_config
from castalia.optim.updater import Updater

KINDS = (
    "adafactor",
    "adam",
    "adamw",
    "adamw8bit",
    "lion",
    "madgrad",
    "muon",
    "schedule_free",
    "sgd",
    "sm3",
    "soap",
)
EVERY_THIRD = (3, 6, 9)
"""Updates on one rank, then on several, then on one again."""


class Tiny(nn.Module):
    """Two matrices that tensor parallelism splits along either dimension; rows are not divisible
    by the ranks, and the smallest parameter has a row for one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1, 6)
        self.layers = nn.ModuleList([nn.Linear(64, 66), nn.Linear(128, 33)])


def tiny() -> Tiny:
    """The model on one rank."""
    torch.manual_seed(0)
    return Tiny()


def sharded(layout: str, everyone: World, pairs: World) -> nn.Module:
    """The model over all ranks by rows, or each matrix over two ranks along its own dimension."""
    model = tiny()
    if layout == "fsdp":
        return fully_shard(model, mesh=everyone.mesh["dp_shard"])
    tp = pairs.mesh["tp"]
    parallelize_module(model.layers[0], tp, ColwiseParallel())
    parallelize_module(model.layers[1], tp, RowwiseParallel())
    distribute_module(model.embed, tp)
    return fully_shard(model, mesh=pairs.mesh["dp_shard"])


def updater_of(model: nn.Module, kind: str) -> Updater:
    """An updater of one kind, whose options make it differ from its neighbours soon."""
    options = {"soap": {"every": 2}, "muon": {"momentum": 0.5}}.get(kind, {})
    config = member_config(kind, {"lr": 0.01, "weight_decay": 0.1, **options})
    return Updater(model, Rules(config, ("*bias",)))


def run(updater: Updater, first: int, last: int) -> None:
    """The updates from `first` to `last`, with the same gradients on every layout."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(updater.model.parameters(), start=1):
            whole = torch.randn(parameter.shape, generator=generator) * 0.1**number
            parameter.grad = torch.zeros_like(parameter)
            fill(parameter.grad, whole)
        updater.step(0.01)


def everything(updater: Updater) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    weights = updater.model.state_dict() | updater.averages()
    return {f"model.{name}": tensor for name, tensor in weights.items()} | updater.tensors()


def save(updater: Updater, folder: Path, step: int, world: World | None = None) -> None:
    """A checkpoint of all ranks."""
    several = {} if world is None else {"rank": world.rank, "world": world.size}
    store = Store(folder, agree=world.smallest if world else None, **several)
    store.save(step, everything(updater), {})
    store.wait()


def load(updater: Updater, folder: Path, step: int) -> None:
    """Continue from a checkpoint."""
    load_into(Store(folder).folder_of(step), everything(updater))
    updater.restore(step)


def apart(updater: Updater, kind: str, updates: int) -> float:
    """The largest difference of a weight from a run on one rank, in units of the largest step."""
    plain = updater_of(tiny(), kind)
    run(plain, 0, updates)
    start = dict(tiny().named_parameters())
    worst = 0.0
    for name, parameter in updater.model.named_parameters():
        value: Any = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        wanted = plain.parameters[name].detach()
        moved = (wanted - start[name].detach()).abs().max()
        assert moved > 0, name
        worst = max(worst, float((value - wanted).abs().max() / moved))
    return worst


def shared(folder: Path) -> dict[str, Any]:
    """Go on from the checkpoints in `folder` on both layouts; the largest differences."""
    everyone = World.start(ParallelConfig(), "cpu")
    degrees = ParallelConfig(tp=2).degrees(everyone.size)
    pairs = World.arranged(everyone.rank, everyone.device, degrees, "cpu")
    once, twice, _ = EVERY_THIRD
    found = {}
    for layout in ("fsdp", "tp"):
        for kind in KINDS:
            updater = updater_of(sharded(layout, everyone, pairs), kind)
            load(updater, folder / kind, once)
            run(updater, once, twice)
            with updater.evaluating():
                pass
            found[f"{layout} {kind}"] = apart(updater, kind, twice)
            save(updater, folder / f"{layout}-{kind}", twice, everyone)
    found["refused"] = refused(lambda: narrow(pairs))
    return found


def narrow(pairs: World) -> Updater:
    """An updater of 8 bits whose ranks split a block of columns."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(64, 64)])
    parallelize_module(model.layers[0], pairs.mesh["tp"], RowwiseParallel())
    return updater_of(model, "adamw8bit")


def refused(make: Any) -> str:
    """The sentence of the ConfigError."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    return "not refused"


if __name__ == "__main__":
    report(shared(Path(sys.argv[1])))
