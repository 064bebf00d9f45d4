"""Presets that fine-tune the model in `model.start`, whose shape and tokenizer they take.

They differ in the rows that they read and the loss; a preset is one dict of what is its own.
"""

from typing import Any

from castalia.config.values import merge

COMMON: dict[str, Any] = {
    "precision": "auto",
    # Texts are much shorter than a row: packed, and kept apart, they waste little of it.
    "data": {"packing": "best_fit", "document_mask": "documents"},
    "train": {"epochs": 3, "batch_size": 16, "log_every": 1, "eval_every": 50},
    # A low rate without decay: the weights are to stay near those of the start. Of second moments
    # the longer memory, since a run is short and its batches small.
    "optim": {"lr": 2e-5, "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 1.0},
    "schedule": {"name": "cosine", "warmup": 0.03},
    "checkpoint": {"every": 500, "keep": 2},
}
FINE_TUNING: dict[str, dict[str, Any]] = {
    "sft": {},
    # A few numbers from zero on need a higher rate than weights that are to stay where they are.
    "lora": {"adapter": {"kind": "lora"}, "optim": {"lr": 2e-4}},
    "dpo": {
        # Each answer in a row of its own: rows are cut to the longest of a micro-batch.
        "data": {"packing": "unpacked", "document_mask": None},
        "train": {"epochs": 1},
        "loss": {"kind": "dpo"},
        # Of TRL. What is learned is a difference, which a higher rate buys with fluency.
        "optim": {"lr": 1e-6},
        "schedule": {"warmup": 0.1},
    },
    "reward": {
        "data": {"packing": "unpacked", "document_mask": None},
        "train": {"epochs": 1},
        "model": {"head": "score"},
        "loss": {"kind": "reward"},
        # The head starts at random, and one number for a text is little to learn from.
        "optim": {"lr": 1e-5},
    },
    "kto": {
        # Each answer in a row of its own, as for dpo.
        "data": {"packing": "unpacked", "document_mask": None},
        "train": {"epochs": 1},
        "loss": {"kind": "kto"},
        "optim": {"lr": 1e-6},
        "schedule": {"warmup": 0.1},
    },
    "grpo": {
        # Each prompt in a row of its own, with room for its answers.
        "data": {"packing": "unpacked", "document_mask": None},
        "train": {"epochs": None, "steps": 200, "batch_size": 8},
        "loss": {"kind": "grpo"},
        # Of TRL. The advantages have the same size however good the model is.
        "optim": {"lr": 1e-6},
        "schedule": {"name": "constant"},
    },
}
"""What each preset has beside COMMON."""


def fine_tuning(name: str) -> dict[str, Any]:
    """One of the presets FINE_TUNING. The section `model` is that of the start."""
    return merge(COMMON, {"recipe": name, "output": f"runs/{name}"}, FINE_TUNING[name])
