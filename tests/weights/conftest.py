"""A run that really learns, and the same checkpoints as a folder of revisions in two shards."""

import json
from pathlib import Path

import pytest
import torch

import castalia
from castalia.checkpoint import read
from castalia.checkpoint.hf.shards import write_weights

STEPS = [0, 1, 2, 4, 6, 8, 10, 12, 14, 16]
WORDS = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "train.batch_size=2",
    "train.log_every=16",
    f"checkpoint.steps={STEPS}",
    "checkpoint.every=null",
    # As Pythia: the rate of the first update is 0.
    "schedule.name=cosine_neox_v1",
    "schedule.warmup=0.1",
    "optim.lr=3e-3",
]


@pytest.fixture(scope="session")
def learning(tmp_path_factory) -> Path:
    """The run; read it only."""
    folder = tmp_path_factory.mktemp("learning") / "small"
    castalia.train("debug", *WORDS, steps=STEPS[-1], output=str(folder))
    return folder


@pytest.fixture(scope="session")
def weights(learning) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of each step; read them only."""
    return {step: read(learning / "checkpoints" / f"step-{step:08d}") for step in STEPS}


def write_revision(folder: Path, tensors: dict[str, torch.Tensor], shard: str = "50KB") -> None:
    """A folder as the hub serves one: config.json, shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_weights(folder, shapes, tensors.__getitem__, torch.float16, shard)
    config = {"model_type": "gpt_neox", "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def published(weights, tmp_path_factory) -> Path:
    """The revisions of a model called pythia-0.1m; read them only."""
    folder = tmp_path_factory.mktemp("published") / "pythia-0.1m"
    for step in STEPS:
        write_revision(folder / f"step{step}", weights[step])
    return folder
