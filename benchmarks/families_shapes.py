"""The models of benchmarks/families.py: one of each family, of about as many weights in use.

A token uses 10 to 13 million weights of the blocks in each; a mixture of experts has more of them.
"""

from typing import Any

VOCABULARY = 8192
WIDTH = 384
EXPERTS = {"balance_loss": 0.0, "group": "row"}
"""Without a balance loss, since transformers adds none to a step unless it is asked for."""
COMMON: dict[str, Any] = {"hidden_size": WIDTH, "vocab_size": VOCABULARY}
ATTENTION = COMMON | {"num_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024}

SHAPES: dict[str, dict[str, Any]] = {
    "neox": ATTENTION | {"family": "neox", "intermediate_size": 4 * WIDTH},
    "llama": ATTENTION | {"family": "llama"},
    "mixtral": ATTENTION
    | {
        "family": "mistral",
        "moe": EXPERTS | {"experts": 8, "top_k": 2, "expert_size": 512, "normalize": True},
    },
    "olmoe": ATTENTION
    | {
        "family": "llama",
        "qk_norm": "width",
        "moe": EXPERTS | {"experts": 32, "top_k": 8, "expert_size": 128},
    },
    # A block of Mamba has half the weights of one of attention and MLP.
    "mamba": COMMON | {"family": "mamba", "num_layers": 12},
    "mamba2": COMMON | {"family": "mamba2", "num_layers": 12},
    "rwkv6": COMMON | {"family": "rwkv6", "num_layers": 6},
    "rwkv7": COMMON | {"family": "rwkv7", "num_layers": 6},
    "gmlp": COMMON | {"family": "gmlp", "num_layers": 6},
}
"""Config of the model of each case."""
PEERS: dict[str, tuple[str, ...]] = {
    "rwkv6": ("literal", "transformers rwkv4"),
    "rwkv7": ("literal", "transformers rwkv4"),
    "gmlp": (),
}
"""Sides beside Castalia's, the one that ratios are taken of first; others have transformers."""
LONGEST_CONTEXT = {"gmlp": 512}
"""Most tokens of a prompt, where a layer has a weight for each pair of positions."""
SMALL_BATCHES = {"mamba": (1, 128)}
"""Rows and tokens where the common batch would take minutes: the backward of transformers' Mamba
writes a tensor of all tokens for each token."""


def model_values(name: str, longest: int) -> dict[str, Any]:
    """The config of a case for rows of up to `longest` tokens."""
    return SHAPES[name] | {"max_position_embeddings": longest}
