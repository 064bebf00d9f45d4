"""One step of preference learning on several ranks, for `tests/train/test_preference.py`.

torchrun --nproc-per-node 2 tests/seams/preferences.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from castalia.data import IGNORED, IndexedDatasetWriter
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train.trainer import Trainer

SMALL = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.vocab_size=64",
    "data.seq_length=16",
    "data.packing=unpacked",
    "data.tokenizer=null",
    "data.corpus=null",
    "train.batch_size=16",
    "train.steps=2",
    "optim.lr=5e-3",
    "loss.kind=dpo",
)
LAYOUTS = {
    "dp": ("parallel.dp_shard=2", "train.micro_batch_size=4"),
    "tp": ("parallel.tp=2", "loss.form=ipo", "loss.reference=live"),
    "pp": ("parallel.pp=2", "train.micro_batch_size=4"),
}
PROMPT = 4


def write_pairs(folder: Path, name: str, count: int, seed: int) -> dict[str, str]:
    """{field of the data section: prefix}: the preferred answer counts up from the prompt's last
    token, the rejected one down."""
    random = np.random.default_rng(seed)
    prefixes = {}
    writers = {}
    for side in ("chosen", "rejected"):
        for kind, dtype in (("", np.uint16), ("_labels", np.int32)):
            prefixes[side + kind] = f"{folder}/{name}-{side}{kind}"
            writers[side + kind] = IndexedDatasetWriter(prefixes[side + kind], dtype)
    for _ in range(count):
        prompt = random.integers(1, 64, PROMPT)
        for side, step in (("chosen", 1), ("rejected", -1)):
            length = random.integers(3, 15)
            answer = (prompt[-1] + step * np.arange(1, length)) % 63 + 1
            tokens = np.concatenate([prompt, answer])
            writers[side].add(tokens)
            labels = np.where(np.arange(len(tokens)) < PROMPT, IGNORED, tokens)
            writers[f"{side}_labels"].add(labels)
    for writer in writers.values():
        writer.close()
    return prefixes


def words_of(train: dict[str, str], valid: dict[str, str] | None = None) -> list[str]:
    """Options that name the files."""
    words = [f"data.{name}={prefix}" for name, prefix in train.items()]
    return words + [f"data.valid_{name}={prefix}" for name, prefix in (valid or {}).items()]


def one_step(world: World, *words: str) -> dict[str, Any]:
    """Loss, metrics and gradients of the first batch."""
    trainer = Trainer(load_config([*SMALL, *words]), world)
    # Away from the start, where all losses of pairs are the same.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    totals = trainer.accumulate(next(trainer.training_batches()))
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        gradients[name] = gradient.flatten().tolist()
    return {"loss": totals.loss, "metrics": totals.metrics, "gradients": gradients}


def main(folder: str) -> dict[str, dict[str, Any]]:
    """Every layout, each with files and references of its own."""
    results: dict[str, dict[str, Any]] = {}
    for number, (layout, words) in enumerate(LAYOUTS.items()):
        own = Path(folder) / str(number)
        files = json.loads((own / "files.json").read_text())
        words = (*words_of(files), f"output={own}/run", *words)
        world = World.start(load_config([*SMALL, *words]).parallel, "cpu")
        results[layout] = one_step(world, *words)
    return results


if __name__ == "__main__":
    from tests.seams.ranks import report

    report(main(*sys.argv[1:]))
