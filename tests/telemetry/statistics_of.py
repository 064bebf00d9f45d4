"""A short run with every statistic on, on one rank or, started as a script, on two in turn with
several layouts."""

import contextlib
import hashlib
import io
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from tests.seams.ranks import report

from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Step
from castalia.train.trainer import Trainer

BASE = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.activation=relu",
    "data.seq_length=16",
    "train.batch_size=12",
    "train.micro_batch_size=6",
    "train.steps=2",
    "optim.clip=0.5",
    "optim.eps=1e-6",
    "checkpoint.steps=[]",
    "checkpoint.every=null",
)
NAMES = (
    "gradient_norms",
    "weight_norms",
    "update_norms",
    "state_norms",
    "zero_gradients",
    "weight_statistics",
    "activations",
    "attention_logits",
    "times",
)
ON = tuple(f"monitor.{name}_every=1" for name in NAMES)
CALLS = "monitor.collectives_every=2"
NOISE = "monitor.noise_scale_every=1"
LAYOUTS = {
    "fsdp": ("parallel.dp_shard=2", "train.micro_batch_size=3", NOISE, CALLS),
    "tp": ("parallel.dp_shard=1", "parallel.tp=2", "train.recompute=selective", NOISE),
    "cp": ("parallel.dp_shard=1", "parallel.cp=2", "train.recompute=true", NOISE),
    "pp": ("parallel.dp_shard=1", "parallel.pp=2", "model.tie_word_embeddings=true", CALLS),
}


class Collect(Hook):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, step: Step) -> None:
        """Take them."""
        self.steps.append(dict(step.metrics))


def trained(*overrides: str, hooks: Sequence[Hook] = ()) -> tuple[list[dict[str, Any]], Trainer]:
    """The metrics of each step, and the trainer."""
    collect = Collect()
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        config = load_config([*BASE, f"output={folder}/run", *overrides])
        trainer = Trainer(config, World.start(config.parallel, "cpu"), hooks=[collect, *hooks])
        trainer.fit()
    return collect.steps, trainer


def digest(trainer: Trainer) -> str:
    """Of the bits of all weights that this rank holds."""
    hashed = hashlib.sha256()
    for parameter in trainer.model.parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        hashed.update(part.detach().numpy().tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, layout in LAYOUTS.items():
        steps, measured = trained(*ON, *layout)
        results[name] = {"steps": steps, "weights": digest(measured)}
        if name in sys.argv[1:]:
            _, plain = trained(*(word for word in layout if word not in (NOISE, CALLS)))
            results[name]["without"] = digest(plain)
    report(results)
