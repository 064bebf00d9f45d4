"""`debug`: a Pythia of about 1M parameters on the bytes of a tiny corpus; seconds on a CPU."""

from typing import Any


def debug(name: str = "debug") -> dict[str, Any]:
    """The preset `debug`, with Pythia's geometric spacing of the early checkpoints.

    The learning rate is constant, so a short run is the beginning of a longer one, step for step.
    A batch of 12 rows is divisible by 1, 2, 3, 4 and 6 ranks.
    """
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "precision": "fp32",
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 257,
            "max_position_embeddings": 128,
        },
        "data": {"seq_length": 64, "corpus": "tiny", "tokenizer": "bytes"},
        "train": {"steps": 60, "batch_size": 12, "log_every": 10},
        "optim": {"lr": 2e-3},
        "schedule": {"name": "constant", "warmup": 0.0},
        "checkpoint": {"steps": [0, 1, 2, 4, 8, 16, 32], "every": 20},
    }
