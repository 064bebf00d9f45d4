"""`demo`: the preset of `castalia demo`, a Pythia of about 5M parameters on Python's own text."""

from typing import Any

from castalia.checkpoint.config import PYTHIA_EARLY


def demo(name: str = "demo") -> dict[str, Any]:
    """The preset `demo`: Pythia's block, schedule and early checkpoints; minutes on two CPU cores.

    The learning rate is twice that of Pythia-14M. A few single-seed trials of this shape, with
    other source weights and 900 steps, gave equal losses at 1.5e-3 and 3e-3 and a worse one at
    5e-3. 2e-3 lies between the first two; it was not compared itself.

    `progress` is the mixer with the lowest mean loss over the sources in benchmarks/mixing.py, by
    less than chance from uniform, which it equals until a source stops learning.
    """
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "precision": "fp32",
        "model": {
            "num_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "vocab_size": 4096,
            "max_position_embeddings": 512,
        },
        "data": {"seq_length": 256, "corpus": "python"},
        "mixing": {"kind": "progress", "warmup_steps": 50},
        "train": {"steps": 1000, "batch_size": 8, "log_every": 50},
        "optim": {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": 0.01, "min_lr": 2e-4},
        "checkpoint": {"steps": PYTHIA_EARLY, "every": None},
    }
