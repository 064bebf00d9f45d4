"""The suites that are known by name, as their files would read."""

from typing import Any

from castalia.recipes.mini import MINI_EARLY
from castalia.recipes.pythia import SIZES, V0_SIZES

ZOO_BASE = ["mini", "data.corpus=python", "model.vocab_size=4096", "model.hidden_size=128"]
"""Text that no model knows by heart after 400 steps of 1,024 tokens."""
ZOO: dict[str, dict[str, Any]] = {
    "neox": {},
    "llama": {
        "preset": "debug-llama",
        "model": {"num_kv_heads": None, "intermediate_size": 344},
    },
    # 8 experts, of which each token uses 2.
    "moe": {
        "preset": "debug-moe",
        "model": {"num_kv_heads": None, "intermediate_size": 172},
    },
    # Two layers have about as many parameters as one of a transformer.
    "mamba": {"preset": "debug-mamba", "model": {"num_layers": 7, "tie_word_embeddings": False}},
    "mamba2": {
        "preset": "debug-mamba2",
        "model": {
            "num_layers": 7,
            "tie_word_embeddings": False,
            "mamba2": {"state_size": 64, "head_size": 32, "chunk_size": 32},
        },
    },
    "rwkv7": {"preset": "debug-rwkv", "model": {"rwkv7": {"head_size": 32, "ffn_size": 392}}},
}
"""Kinds of models with equally many parameters at work on a token, embeddings aside."""
BUILTIN: dict[str, dict[str, Any]] = {
    # Biderman et al. 2023, arXiv:2304.01373. The further seeds are those of PolyPythias, van der
    # Wal et al. 2025, arXiv:2503.09543, which has them of the five smallest sizes.
    "pythia": {
        "name": "pythia",
        "sizes": {size: f"pythia-{size}" for size in SIZES},
        "data": {"standard": {}, "deduped": {"preset": "{preset}-deduped"}},
        "seeds": [1234],
        "extra_seeds": list(range(10)),
        "unnamed_seed": 1234,
    },
    # Its batches are not those of all sizes: some had twice the rows in half the steps.
    "pythia-v0": {
        "name": "pythia-v0",
        "sizes": {size: f"pythia-{size}" for size in V0_SIZES},
        "data": {
            "standard": {"preset": "{preset}-v0"},
            "deduped": {"preset": "{preset}-deduped-v0"},
        },
        "seeds": [1234],
        "unnamed_seed": 1234,
        "checkpoints": None,
        "same_batches": False,
    },
    "mini": {
        "name": "mini",
        "base": "mini",
        "sizes": {
            "tiny": {"model.num_layers": 2, "model.hidden_size": 64},
            "small": {"model.num_layers": 3, "model.hidden_size": 96},
            "medium": {"model.num_layers": 4, "model.hidden_size": 160},
        },
        "seeds": [0, 1],
        "checkpoints": {"steps": MINI_EARLY, "every": 100},
    },
    "zoo": {
        "name": "zoo",
        "base": ZOO_BASE,
        "sizes": ZOO,
        "seeds": [0],
        "extra_seeds": [1, 2],
        "unnamed_seed": 0,
        "checkpoints": {"steps": [0], "every": 100},
    },
}
