"""Published mixtures of experts."""

from castalia.recipes.shapes import M, Published

# Muennighoff et al. 2024, arXiv:2409.02060, table 10, and configs of allenai/OLMoE.
OLMOE = Published(
    *("llama", 16, 2048, 16, 50304, 4e-4, 5.1e12, 4 * M, 4096),
    {
        "intermediate_size": 1024,
        "qk_norm": "width",
        "moe": {
            "experts": 64,
            "top_k": 8,
            "balance_loss": 0.01,
            "z_loss": 0.001,
        },
    },
)
# Jiang et al. 2024, arXiv:2401.04088, table 1, which gives the shape alone.
MIXTRAL = Published(
    *("mistral", 32, 4096, 32, 32000, 3e-4, 2e12, 4 * M, 8192),
    {
        "intermediate_size": 14336,
        "num_kv_heads": 8,
        "rotary_emb_base": 1000000.0,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "moe": {"experts": 8, "top_k": 2, "normalize": True, "balance_loss": 0.02},
    },
)
EXPERTS = {"olmoe-1b-7b": OLMOE, "mixtral-8x7b": MIXTRAL}
