"""Published models of RWKV."""

from castalia.recipes.shapes import M, Published

WORLD = 65536
"""Rows of the embedding of RWKV's World vocabulary."""
# Peng et al. 2024, arXiv:2404.05892, tables 2 and 3 (the shapes and the corpus); the 7B is a later
# one of the same kind. The rates are those of models of these sizes.
RWKV_6 = {
    "rwkv6-1.6b": Published("rwkv6", 24, 2048, 0, WORLD, 4e-4, 1.12e12, 2 * M, 4096),
    "rwkv6-3b": Published("rwkv6", 32, 2560, 0, WORLD, 3e-4, 1.12e12, 2 * M, 4096),
    "rwkv6-7b": Published("rwkv6", 32, 4096, 0, WORLD, 3e-4, 1.12e12, 4 * M, 4096),
    # GPT-NeoX, configs/rwkv/170M.yml, in which the final norm has no bias; 500 short steps.
    "rwkv6-170m": Published(
        *("rwkv6", 12, 768, 0, 50304, 8e-4, 500 * 32 * 512, 32 * 512, 512),
        {"norm": "rmsnorm", "init_method": "small_init", "max_position_embeddings": 2048},
        min_lr_share=1.0,
        warmup_steps=5,
    ),
}
# Peng et al. 2025, arXiv:2503.14456, section 5 and the published files: the corpus has 3.1T tokens.
# The rates are those of models of these sizes. The gate of the second is narrower than the rule of
# BlinkDL's code makes it.
RWKV_7 = {
    "rwkv7-0.1b": Published("rwkv7", 12, 768, 0, WORLD, 6e-4, 3.1e12, 1 * M, 4096),
    "rwkv7-0.4b": Published(
        "rwkv7", 24, 1024, 0, WORLD, 5e-4, 3.1e12, 1 * M, 4096, {"rwkv7": {"gate_rank": 128}}
    ),
    "rwkv7-1.5b": Published("rwkv7", 24, 2048, 0, WORLD, 4e-4, 3.1e12, 2 * M, 4096),
    "rwkv7-2.9b": Published("rwkv7", 32, 2560, 0, WORLD, 4e-4, 3.1e12, 2 * M, 4096),
}
RWKV = {**RWKV_6, **RWKV_7}
