"""GPT-NeoX's published config files at reduced width: read, and trained for two steps."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from castalia.checkpoint.hf.formats import best_format
from castalia.core.errors import ConfigError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.models.config import TransformerConfig
from castalia.models.model_config import ModelConfig
from castalia.recipes import Resolved, resolve
from castalia.runs.config import RunConfig
from castalia.train.hooks import Hook
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
WIDTH = 64
HEADS = 8
ROW = 32
# What a file without a batch, or with a tokenizer that is not on this machine, leaves open.
OPEN = ("train.batch_size=4", "model.vocab_size=256", "model.make_vocab_size_divisible_by=64")
REASONS = {
    "DPO, KTO, reward models and REINFORCE are not supported yet": "another loss",
    "a comma is missing before this place": "fault of the file: a comma is missing",
    "published with layers and heads exchanged": "fault of the file: layers and heads exchanged",
}
"""What an error says -> why the file is refused."""


class Outcome(NamedTuple):
    """What became of a file."""

    losses: list[float]
    """Of its two steps; none if it is refused."""
    reason: str = ""
    """Why it is refused; the error where no reason is known, which is a failure."""
    family: str = ""
    architecture: str = ""
    """Of its export for transformers; empty if no architecture expresses the model."""
    precision: str = ""
    notes: tuple[str, ...] = ()


class Losses(Hook):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, step) -> None:
        self.losses.append(step.metrics["loss"])


def write_tokens(folder: Path) -> tuple[Path, Path]:
    """Token file and label file of a few documents of bytes; half of the tokens are targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = IndexedDatasetWriter(folder / "tokens", "uint16")
    labels = IndexedDatasetWriter(folder / "labels", "int32")
    with tokens, labels:
        for size in range(40, 140):
            document = torch.randint(1, 256, (size,), generator=generator).numpy()
            tokens.add(document)
            label = document.copy()
            label[: size // 2] = -100
            labels.add(label)
    return folder / "tokens", folder / "labels"


def read(path: Path) -> tuple[list[str], Resolved]:
    """The words that name a file, with what GPT-NeoX's users name beside it, and their config.

    Files without a model are laid over a preset, and lists of weights over the list of sources.
    """
    words = [str(path)]
    if path.parent.name == "train_data_weights":
        words = ["pythia-70m", str(path.parents[1] / "data" / "pile.yml"), str(path)]
    try:
        return words, resolve([*words, *OPEN])
    except ConfigError as error:
        if "no model in" not in str(error):
            raise
    words = ["pythia-70m", *words]
    return words, resolve([*words, *OPEN])


def reduced(config: RunConfig, tokens: Path, labels: Path, output: Path) -> list[str]:
    """Overrides that make a run small and leave its options."""
    shrunk = {
        "num_layers": 2,
        "hidden_size": WIDTH,
        "vocab_size": 256,
        "make_vocab_size_divisible_by": 64,
        "max_position_embeddings": ROW,
        "start": None,
        **narrow(config.model),
    }
    sources = max(1, len(config.data.train))
    sections = {
        "model": shrunk,
        "data": {
            "seq_length": ROW,
            "train": [str(tokens)] * sources,
            "valid": [str(tokens)] * len(config.data.valid),
            "labels": [str(labels)] * len(config.data.labels),
            "valid_labels": [str(labels)] * len(config.data.valid_labels),
            "tokenizer": None,
            "workers": 0,
        },
        "train": {
            "steps": 2,
            "batch_size": 4,
            "micro_batch_size": 2,
            "eval_every": None,
            "start_step": False,
            "start_optimizer": False,
        },
        "parallel": {"tp": 1, "pp": 1},
    }
    words = [f"output={output}"]
    for section, values in sections.items():
        words += [f"{section}.{key}={json.dumps(value)}" for key, value in values.items()]
    return words


def narrow(model: ModelConfig) -> dict[str, Any]:
    """Heads and widths of a small model, in the proportions of the whole one."""
    if not isinstance(model, TransformerConfig):
        return {}
    shrunk = {
        "num_attention_heads": HEADS,
        "num_kv_heads": max(1, HEADS * model.kv_heads // model.num_attention_heads),
        "intermediate_size": 2 * math.ceil(model.ffn_size * WIDTH / model.hidden_size / 2),
    }
    if model.sliding_window is not None:
        shrunk["sliding_window"] = ROW // 2
    return shrunk


def architecture_of(model: ModelConfig) -> str:
    """The architecture of transformers that expresses a model; empty if there is none."""
    try:
        form, lacks = best_format(model)
    except ConfigError:
        return ""
    return "" if lacks else form.architectures[0]


def outcome(path: Path, tokens: Path, labels: Path, folder: Path) -> Outcome:
    """Read a file, and train it for two steps at reduced width, or say why it is refused."""
    try:
        # As it is first: a width that the reduction replaces must not hide a refusal.
        words, whole = read(path)
        small = resolve([*words, *reduced(whole.config, tokens, labels, folder / "run")])
    except ConfigError as error:
        known = [reason for text, reason in REASONS.items() if re.search(text, str(error))]
        return Outcome([], known[0] if known else str(error))
    kept = Losses()
    Trainer(small.config, ALONE, hooks=[kept]).fit()
    return Outcome(
        kept.losses,
        family=whole.config.model.family,
        architecture=architecture_of(whole.config.model),
        precision=whole.config.precision,
        notes=tuple(whole.notes),
    )
