"""Published models of other families: their exact shapes, and how they were trained.

Where a paper does not say how a model was trained, the rates are those of a model of its size; a
comment says so. Data and tokenizer are yours: see `data.train`.
"""

from typing import Any

from castalia.recipes.shapes import M, Published
from castalia.recipes.zoo_experts import EXPERTS
from castalia.recipes.zoo_mamba import STATE_SPACES
from castalia.recipes.zoo_rwkv import RWKV

LLAMA_3 = {
    "num_kv_heads": 8,
    "rotary_emb_base": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA_31 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
CODE = {"rotary_emb_base": 1000000.0, "max_position_embeddings": 16384}
FALCON_40B = {"num_kv_heads": 8, "shared_norm": False}
FALCON_RW = {
    "num_kv_heads": None,
    "pos_emb": "alibi",
    "alibi_scaled": True,
    "alibi_numerics": "bf16",
    "parallel_residual": False,
    "shared_norm": False,
    "attention_bias": True,
    "mlp_bias": True,
}
GPT2 = {"max_position_embeddings": 1024}


def with_ffn(size: int, **options: Any) -> dict[str, Any]:
    """Options with the width inside the MLP."""
    return {"intermediate_size": size, **options}


# Touvron et al. 2023, arXiv:2302.13971, tables 2 and 3, and arXiv:2307.09288, section 2.2; Dubey et
# al. 2024, arXiv:2407.21783, table 3; Roziere et al. 2023, arXiv:2308.12950, section 2.2.
LLAMA = {
    "llama-7b": Published(
        "llama", 32, 4096, 32, 32000, 3e-4, 1e12, 4 * M, 2048, {"layernorm_epsilon": 1e-6}
    ),
    "llama-13b": Published(
        "llama", 40, 5120, 40, 32000, 3e-4, 1e12, 4 * M, 2048, {"layernorm_epsilon": 1e-6}
    ),
    "llama-30b": Published(
        "llama", 60, 6656, 52, 32000, 1.5e-4, 1.4e12, 4 * M, 2048, {"layernorm_epsilon": 1e-6}
    ),
    "llama-65b": Published("llama", 80, 8192, 64, 32000, 1.5e-4, 1.4e12, 4 * M, 2048),
    "llama-2-7b": Published("llama", 32, 4096, 32, 32000, 3e-4, 2e12, 4 * M, 4096),
    "llama-2-13b": Published("llama", 40, 5120, 40, 32000, 3e-4, 2e12, 4 * M, 4096),
    "llama-2-70b": Published(
        *("llama", 80, 8192, 64, 32000, 1.5e-4, 2e12, 4 * M, 4096),
        with_ffn(28672, num_kv_heads=8),
    ),
    "llama-3-8b": Published(
        "llama", 32, 4096, 32, 128256, 3e-4, 15e12, 4 * M, 8192, with_ffn(14336, **LLAMA_3)
    ),
    "llama-3-70b": Published(
        "llama", 80, 8192, 64, 128256, 1.5e-4, 15e12, 4 * M, 8192, with_ffn(28672, **LLAMA_3)
    ),
    "llama-3.1-8b": Published(
        *("llama", 32, 4096, 32, 128256, 3e-4, 15e12, 4 * M, 8192),
        with_ffn(14336, **LLAMA_3 | LLAMA_31),
    ),
    "codellama-7b": Published("llama", 32, 4096, 32, 32016, 3e-4, 5e11, 4 * M, 16384, CODE),
    "codellama-34b": Published(
        *("llama", 48, 8192, 64, 32000, 1.5e-4, 5e11, 4 * M, 16384),
        with_ffn(22016, num_kv_heads=8, **CODE),
    ),
}
# Jiang et al. 2023, arXiv:2310.06825, table 1, which gives the shape alone.
MISTRAL = {
    "mistral-7b": Published(
        *("mistral", 32, 4096, 32, 32000, 3e-4, 2e12, 4 * M, 8192),
        with_ffn(14336, num_kv_heads=8, max_position_embeddings=32768),
    ),
}
# Almazrouei et al. 2023, arXiv:2311.16867, table 16, and the model cards of Falcon RW.
FALCON = {
    "falcon-rw-1b": Published(
        *("falcon", 24, 2048, 32, 50304, 2e-4, 3.5e11, 1 << 20, 2048),
        FALCON_RW,
        warmup_steps=500,
    ),
    "falcon-7b": Published("falcon", 32, 4544, 71, 65024, 6e-4, 1.5e12, 2304 * 2048, 2048),
    "falcon-40b": Published(
        "falcon", 60, 8192, 128, 65024, 1.85e-4, 1e12, 1152 * 2048, 2048, FALCON_40B
    ),
}
# Chowdhery et al. 2022, arXiv:2204.02311, tables 1 and 2. Norms have biases, as GPT-NeoX builds
# them. The rates are those of AdamW at these sizes: PaLM was trained with Adafactor.
PALM = {
    "palm-8b": Published("palm", 32, 4096, 16, 256000, 3e-4, 7.8e11, 2 * M, 2048, with_ffn(16384)),
    "palm-62b": Published(
        "palm", 64, 8192, 32, 256000, 1.5e-4, 7.95e11, 2 * M, 2048, with_ffn(32768)
    ),
    "palm-540b": Published(
        *("palm", 118, 18432, 48, 256000, 1e-4, 7.8e11, 4 * M, 2048),
        with_ffn(73728, attention_head_dim=256),
    ),
}
# Radford et al. 2019, table 2; the rates are those of GPT-3's models of these sizes.
GPT_2 = {
    "gpt2": Published("gpt2", 12, 768, 12, 50257, 6e-4, 9e9, 512 * 1024, 1024, GPT2),
    "gpt2-medium": Published("gpt2", 24, 1024, 16, 50257, 3e-4, 9e9, 512 * 1024, 1024, GPT2),
    "gpt2-large": Published("gpt2", 36, 1280, 20, 50257, 2.5e-4, 9e9, 512 * 1024, 1024, GPT2),
    "gpt2-xl": Published("gpt2", 48, 1600, 25, 50257, 2e-4, 9e9, 512 * 1024, 1024, GPT2),
}
# OLMo team 2024, arXiv:2501.00656, tables 1 and 2; Qwen team 2024, arXiv:2412.15115, table 1, which
# gives the shape alone.
OTHERS = {
    "olmo-2-7b": Published(
        "olmo2", 32, 4096, 32, 100352, 3e-4, 4e12, 4 * M, 4096, {"max_position_embeddings": 4096}
    ),
    "qwen2.5-0.5b": Published(
        *("qwen2", 24, 896, 14, 151936, 4e-4, 18e12, 4 * M, 4096),
        with_ffn(4864, num_kv_heads=2, tie_word_embeddings=True, max_position_embeddings=32768),
    ),
    "qwen2.5-7b": Published(
        *("qwen2", 28, 3584, 28, 152064, 3e-4, 18e12, 4 * M, 4096),
        with_ffn(18944, num_kv_heads=4, max_position_embeddings=131072),
    ),
}
# Black et al. 2022, arXiv:2204.06745, appendix D, and the published file.
NEOX = {
    "gpt-neox-20b": Published(
        *("neox", 44, 6144, 64, 50432, 0.97e-4, 1536 * 2048 * 150_000, 1536 * 2048, 2048),
        {"rope_numerics": "neox_v1_fp16"},
        weight_decay=0.01,
        warmup_steps=1500,
    ),
}
MODELS = NEOX | LLAMA | MISTRAL | FALCON | PALM | GPT_2 | OTHERS | EXPERTS | STATE_SPACES | RWKV


def published(name: str) -> dict[str, Any]:
    """The preset `name` of MODELS, without data."""
    model = MODELS[name]
    steps = round(model.tokens / model.batch_tokens)
    neox = model.family == "neox"
    heads = {"num_attention_heads": model.heads} if model.heads else {}
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "seed": 1234,
        "precision": "fp16" if neox else "bf16",
        "model": {
            "family": model.family,
            "num_layers": model.layers,
            "hidden_size": model.width,
            **heads,
            "vocab_size": model.vocabulary,
            # The published matrices have exactly so many rows.
            "make_vocab_size_divisible_by": 1,
            "max_position_embeddings": model.seq_length,
            **model.options,
        },
        "data": {"seq_length": model.seq_length},
        "train": {
            "steps": steps,
            "batch_size": model.batch_tokens // model.seq_length,
            "micro_batch_size": 1,
            "recompute": True,
            "log_every": 10,
        },
        "optim": {
            "lr": model.lr,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": model.weight_decay,
            "clip": 1.0,
        },
        "schedule": {
            "name": "cosine_neox_v1" if neox else "cosine",
            "warmup": model.warmup_steps / steps,
            "min_lr": float(f"{model.lr * model.min_lr_share:.6g}"),
            "decay_steps": steps,
        },
        "checkpoint": {"every": 1000},
    }
