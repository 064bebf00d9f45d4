"""`debug`: models of about 1M parameters on the bytes of a tiny corpus; seconds on a CPU.

`debug` is a Pythia; `debug-llama` and others are models of the other families.
"""

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "debug-llama": {"family": "llama", "num_kv_heads": 2, "intermediate_size": 352},
    "debug-mistral": {
        "family": "mistral",
        "num_kv_heads": 2,
        "intermediate_size": 352,
        # Shorter than a row, so that it makes a difference.
        "sliding_window": 32,
    },
    "debug-falcon": {"family": "falcon"},
    "debug-palm": {"family": "palm", "intermediate_size": 352},
    "debug-gpt2": {"family": "gpt2"},
    "debug-olmo2": {"family": "olmo2", "intermediate_size": 352},
    "debug-moe": {
        "family": "llama",
        "num_kv_heads": 2,
        "intermediate_size": 176,
        "moe": {"experts": 8, "top_k": 2, "normalize": True},
    },
    "debug-rwkv": {"family": "rwkv7", "rwkv7": {"head_size": 32}},
    "debug-rwkv6": {"family": "rwkv6", "rwkv6": {"head_size": 32}},
    "debug-qwen2": {"family": "qwen2", "num_kv_heads": 2, "intermediate_size": 352},
    "debug-mamba": {"family": "mamba"},
    "debug-mamba2": {
        "family": "mamba2",
        "mamba2": {"state_size": 32, "head_size": 32, "chunk_size": 32},
    },
    "debug-gmlp": {"family": "gmlp", "gmlp": {"inner_size": 384}},
    "debug-amlp": {"family": "amlp", "gmlp": {"inner_size": 384, "attention_size": 32}},
    "debug-hybrid": {
        "family": "llama",
        "num_kv_heads": 2,
        "intermediate_size": 352,
        "pattern": ["mamba", "attention", "gmlp", "mamba"],
    },
}
"""What the section `model` of each has beside the sizes of `debug`."""
HEADLESS = ("mamba", "mamba2", "gmlp", "amlp", "rwkv6", "rwkv7")
"""Families without attention heads."""


def debug(name: str = "debug") -> dict[str, Any]:
    """The preset `debug` or one of FAMILIES, with Pythia's spacing of the early checkpoints.

    The learning rate is constant, so a short run is the beginning of a longer one, step for step.
    A batch of 12 rows is divisible by 1, 2, 3, 4 and 6 ranks.
    """
    family = FAMILIES.get(name, {})
    heads = {} if family.get("family") in HEADLESS else {"num_attention_heads": 4}
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "precision": "fp32",
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            **heads,
            "vocab_size": 257,
            "max_position_embeddings": 128,
            **family,
        },
        "data": {"seq_length": 64, "corpus": "tiny", "tokenizer": "bytes"},
        "train": {"steps": 60, "batch_size": 12, "log_every": 10},
        "optim": {"lr": 2e-3},
        "schedule": {"name": "constant", "warmup": 0.0},
        "checkpoint": {"steps": [0, 1, 2, 4, 8, 16, 32], "every": 20},
    }
