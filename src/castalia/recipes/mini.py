"""`mini`: the models of the miniature suite, on texts of which everything is known."""

from typing import Any

MINI_EARLY = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
"""Pythia's spacing of the early checkpoints, for a run of a few hundred steps."""


def mini(name: str = "mini") -> dict[str, Any]:
    """The preset `mini`, the largest size of the suite of that name: less than a minute on two CPU
    cores.

    The run reads each text about as often as the corpus has it; see corpora/known_texts.py.
    """
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "precision": "fp32",
        "model": {
            "num_layers": 4,
            "hidden_size": 160,
            "num_attention_heads": 4,
            "vocab_size": 2048,
            "max_position_embeddings": 128,
        },
        "data": {"seq_length": 128, "corpus": "mini"},
        "train": {"steps": 400, "batch_size": 8, "log_every": 50},
        "optim": {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": 0.02, "min_lr": 3e-4},
        "checkpoint": {"steps": MINI_EARLY, "every": 100},
    }
