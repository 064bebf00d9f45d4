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

from castalia.data import IGNORED, IndexedDataset, IndexedDatasetWriter
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
    "kto, dp": ("loss.kind=kto", "parallel.dp_shard=2", "train.micro_batch_size=4"),
    "kto, tp": ("loss.kind=kto", "parallel.tp=2", "loss.reference=live"),
    "kto, pp": ("loss.kind=kto", "parallel.pp=2", "train.micro_batch_size=4"),
    "reward, dp": ("loss.kind=reward", "model.head=score", "train.micro_batch_size=4"),
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


def write_labelled(folder: Path, name: str, count: int, seed: int) -> dict[str, str]:
    """As `write_pairs`, each answer alone with the label 1 or -1."""
    pairs = write_pairs(folder, f"{name}-pairs", count, seed)
    fields = {"train": np.uint16, "labels": np.int32, "rewards": np.float32}
    prefixes = {field: f"{folder}/{name}-{field}" for field in fields}
    writers = {field: IndexedDatasetWriter(prefixes[field], fields[field]) for field in fields}
    opened = {name: IndexedDataset(prefix) for name, prefix in pairs.items()}
    for document in range(count):
        for side, label in (("chosen", 1.0), ("rejected", -1.0)):
            writers["train"].add(opened[side][document])
            writers["labels"].add(opened[f"{side}_labels"][document])
            writers["rewards"].add([label])
    for writer in writers.values():
        writer.close()
    return prefixes


def write_rows(layout: str, folder: Path, name: str, count: int, seed: int) -> dict[str, str]:
    """The files that a layout's loss reads."""
    write = write_labelled if layout.startswith("kto") else write_pairs
    return write(folder, name, count, seed)


def words_of(train: dict[str, str], valid: dict[str, str] | None = None) -> list[str]:
    """Options that name the files."""
    words = [f"data.{name}={prefix}" for name, prefix in train.items()]
    for name, prefix in (valid or {}).items():
        words.append(f"data.valid={prefix}" if name == "train" else f"data.valid_{name}={prefix}")
    return words


def one_step(world: World, *words: str) -> dict[str, Any]:
    """Loss, metrics and gradients of the first batch."""
    trainer = Trainer(load_config([*SMALL, *words]), world)
    # Away from the start, where all losses of pairs are the same. Smaller weights make answers to
    # other prompts likelier, a divergence above 0.
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5 if trainer.loss.rows == "labelled" else 1.5)
    totals = trainer.accumulate(trainer.prepared(next(trainer.training_batches())))
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
