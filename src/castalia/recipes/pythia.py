"""The ten Pythia sizes as they were trained, each for the Pile and for the deduplicated Pile.

The two runs of a size differ in their data alone, except that 1b was trained in bf16.

Source  the published GPT-NeoX files (github.com/EleutherAI/pythia, models/), corrected where they
        are known to be wrong. pythia-12b-deduped has 36 layers and 40 heads: the file says 40 and
        36, but only the former give the released 11,846,072,320 parameters. The released 1b was
        trained in bf16: its file says fp16. 1b-deduped is fp16.
"""

from typing import Any, NamedTuple

from castalia.checkpoint.config import PYTHIA_EARLY
from castalia.models import ModelConfig, NeoxConfig

STEPS = 143_000
BATCH = 1024
"""Rows of 2048 tokens in one step, of every published run."""
TOKENIZER_IDS = 50_277
"""Ids of the GPT-NeoX-20B tokenizer, added tokens included."""


class Size(NamedTuple):
    """The settings that differ between sizes."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    lr: float
    micro_batch_size: int
    """Rows of one forward pass on a GPU of the published run."""
    vocab_multiple: int = 128
    """128 times the tensor-parallel degree of the published run; pads the embedding's rows."""
    recompute: bool = True
    neox_default_init: bool = False
    """The file of this size sets no initialization, so GPT-NeoX's defaults applied."""


SIZES = {
    "14m": Size(6, 128, 4, 1e-3, 32, recompute=False),
    "31m": Size(6, 256, 8, 1e-3, 32, recompute=False),
    "70m": Size(6, 512, 8, 1e-3, 32),
    "160m": Size(12, 768, 12, 6e-4, 32),
    "410m": Size(24, 1024, 16, 3e-4, 32),
    "1b": Size(16, 2048, 8, 2.5e-4, 16),
    "1.4b": Size(24, 2048, 16, 2e-4, 16),
    "2.8b": Size(32, 2560, 32, 1.6e-4, 16),
    "6.9b": Size(32, 4096, 32, 1.2e-4, 8, vocab_multiple=256, neox_default_init=True),
    "12b": Size(36, 5120, 40, 1.2e-4, 8, vocab_multiple=512, neox_default_init=True),
}


def model(size: Size) -> dict[str, Any]:
    """Values of the section `model`."""
    init = "small_init"
    output_init = "wang_init"
    if size.neox_default_init:
        init = "normal"
        output_init = "scaled_normal"
    return {
        "num_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "vocab_size": TOKENIZER_IDS,
        "make_vocab_size_divisible_by": size.vocab_multiple,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "parallel_residual": True,
        "tie_word_embeddings": False,
        "activation": "gelu_tanh",
        "init_method": init,
        "output_layer_init_method": output_init,
    }


def pythia(name: str) -> dict[str, Any]:
    """The preset `pythia-<size>` or `pythia-<size>-deduped`, without data: see `data.train`."""
    key = name.removeprefix("pythia-").removesuffix("-deduped")
    size = SIZES[key]
    return {
        "recipe": name,
        "output": f"runs/{name}",
        "seed": 1234,
        "precision": "bf16" if name == "pythia-1b" else "fp16",
        "model": model(size),
        "data": {"seq_length": 2048},
        "train": {
            "steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": size.micro_batch_size,
            "recompute": size.recompute,
            "log_every": 10,
        },
        "optim": {
            "lr": size.lr,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,
        },
        "schedule": {
            "name": "cosine_neox_v1",
            "warmup": 0.01,
            # A tenth of the peak; six digits remove the float error, so 1e-4 stays 1e-4.
            "min_lr": float(f"{size.lr / 10:.6g}"),
            "decay_steps": STEPS,
        },
        # Without effect in 1b, which is bf16.
        "loss_scale": {"initial_power": 12, "window": 1000, "hysteresis": 2, "minimum": 1.0},
        "checkpoint": {"steps": PYTHIA_EARLY, "every": 1000},
        "parallel": {"reshard_after_forward": False},
    }


NAMES = [f"pythia-{size}{data}" for size in SIZES for data in ("", "-deduped")]


def same_shape(config: ModelConfig) -> str | None:
    """Name of the preset whose shape the model has, or None."""
    if not isinstance(config, NeoxConfig):
        return None
    if config.rotary_pct != 0.25 or not config.parallel_residual or config.tie_word_embeddings:
        return None
    shape = (config.num_layers, config.hidden_size, config.num_attention_heads)
    return next((f"pythia-{name}" for name, size in SIZES.items() if size[:3] == shape), None)


def known_mistakes(values: Any) -> list[str]:
    """The way out for model values that a published file has by mistake."""
    if not isinstance(values, dict):
        return []
    shape = [values.get(key) for key in ("num_layers", "hidden_size", "num_attention_heads")]
    if shape != [40, 5120, 36]:
        return []
    return [
        "pythia-12b-deduped.yml was published with layers and heads exchanged; set"
        " model.num_layers=36 model.num_attention_heads=40, or use the preset pythia-12b-deduped"
    ]
