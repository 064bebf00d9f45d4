"""A guest optimizer, plain SGD, and a run with it and frozen parameters on any number of ranks."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from tests.seams.ranks import report
from tests.seams.sharded_updates import shared

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.checkpoint.manifest import read_manifest
from castalia.distributed import World
from castalia.monitor import read_metrics
from castalia.optim import OPTIMIZERS, Member, OptimConfig, StateTensor
from castalia.recipes import load_config
from castalia.train.run import standard_hooks
from castalia.train.trainer import Trainer


class SgdConfig(OptimConfig):
    """Plain SGD."""

    kind: Literal["toy_sgd"] = "toy_sgd"
    momentum: float = 0.0


@OPTIMIZERS.register("toy_sgd")
class Sgd(Member):
    """p -= lr * (g + weight_decay * p)."""

    Config = SgdConfig

    @classmethod
    def state(cls, config: Any) -> dict[str, StateTensor]:
        """Nothing without momentum."""
        return {"momentum_buffer": StateTensor()} if config.momentum else {}

    @classmethod
    def build(cls, groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
        """torch's."""
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


FROZEN = ("embed.*", "layers.1.*")


def train(folder: Path, tokens: str, *overrides: str) -> dict[str, Any]:
    """A run of the debug preset; what its weights and its newest checkpoint hold."""
    words = [f"data.train={tokens}", f"output={folder}", "schedule.name=constant", *overrides]
    config = load_config(["debug", "train.steps=3", "optim.lr=0.01", *words])
    world = World.start(config.parallel, "cpu")
    trainer = Trainer(config, world, hooks=standard_hooks())
    before = whole(trainer.model)
    trainer.fit()
    after = whole(trainer.model)
    step = complete_steps(folder / "checkpoints")[-1]
    manifest = read_manifest(find_checkpoint(folder / f"step{step}"))
    saved = sorted(name for name in manifest.tensors if name.startswith("optim."))
    moved = sorted(name for name in after if not torch.equal(before[name], after[name]))
    return {
        "moved": moved,
        "state": saved,
        "live_state": sum(t.numel() for t in trainer.updater.tensors().values()),
        "losses": [line["loss"] for line in read_metrics(folder / "metrics.jsonl")],
    }


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, put together."""
    copies = {}
    for name, parameter in model.named_parameters():
        tensor: Any = parameter.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        copies[name] = tensor.clone()
    return copies


def every_run(folder: Path, tokens: str) -> dict[str, dict[str, Any]]:
    """One run for each thing that the seam has to carry."""
    frozen = f"train.frozen=[{', '.join(FROZEN)}]"
    sgd = ["optim.kind=toy_sgd", "optim.weight_decay=0", "optim.clip=null"]
    groups = (
        "optim.groups=[{pattern: '*bias', lr_scale: 0}, {pattern: 'layers.0.*', kind: toy_sgd}]"
    )
    return {
        "sgd": train(folder / "sgd", tokens, *sgd),
        "frozen": train(folder / "frozen", tokens, frozen),
        "groups": train(folder / "groups", tokens, groups),
    }


if __name__ == "__main__":
    runs = every_run(Path(sys.argv[1]), sys.argv[2])
    report(runs | {"shared": shared(Path(sys.argv[1]) / "shared")})
