"""The ten Pythia sizes as they were trained, each for the Pile and for the deduplicated Pile; their
first versions (v0), and the runs with smaller batches.

The two runs of a size differ in their data alone, except that 1b was trained in bf16. What
GPT-NeoX v1.0 computed in a way of its own is in the presets: the clipped cosine, whose first rate
is 0 (schedule cosine_neox_v1), GELU by tanh, rotary tables in fp16, start values, and a vocabulary
padded by the tensor-parallel degree.

Source  v0: the arguments in the published results of v0. The smaller batches: names and numbers of
        steps in the published results; rate and checkpoints of these runs are not known, so that
        they have the size's rate and a checkpoint where the full batch has one.
        The others: the published GPT-NeoX files (github.com/EleutherAI/pythia, models/), corrected
        where they are known to be wrong. pythia-12b-deduped has 36 layers and 40 heads: the file
        says 40 and 36, but only the former give the released 11,846,072,320 parameters. The
        released 1b was trained in bf16: its file says fp16. 1b-deduped is fp16.
"""

from typing import Any, NamedTuple

from castalia.checkpoint.config import PYTHIA_EARLY
from castalia.config.values import merge
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

PUBLISHED_COST = {
    "70m": (32, 510),
    "160m": (32, 1_030),
    "410m": (32, 2_540),
    "1b": (64, 4_830),
    "1.4b": (64, 7_120),
    "2.8b": (64, 14_240),
    "6.9b": (128, 33_500),
    "12b": (256, 72_300),
}
"""Size -> A100 GPUs with 40 GB of the published run, and its GPU-hours.

Source  the published files, and Biderman et al. 2023, arXiv:2304.01373, appendix D.
"""


class Batch(NamedTuple):
    """A batch that a size was also trained with; all runs read the same number of tokens."""

    rows: int
    """Rows of 2048 tokens in a step."""
    steps: int


V0_BATCH = Batch(2048, 71_500)
"""Of the sizes that had 4M tokens in a step in v0."""
V0_DECAY = 71_250
"""Their horizon of the learning rate, lr_decay_iters."""
V0_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
V0_LARGE_BATCH = ("160m", "410m", "1.4b")
V0_RATE_TO_ZERO = ("6.9b", "12b")
SMALLER_BATCHES = {
    "70m": ("0.25MtokBS", Batch(128, 1_144_000)),
    "160m": ("0.5MtokBS", Batch(256, 572_000)),
    "410m": ("0.5MtokBS", Batch(256, 572_000)),
    "1b": ("0.5MtokBS", Batch(256, 572_000)),
    "1.4b": ("1MtokBS", Batch(512, 286_000)),
}
"""Size -> end of the name and batch of the run that compares batch sizes."""


def model(size: Size, precision: str) -> dict[str, Any]:
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
        # .half() on the model rounded the frequencies too. The run in bf16 rounded elsewhere.
        "rope_numerics": "neox_v1_fp16" if precision == "fp16" else "fp32",
        "parallel_residual": True,
        "tie_word_embeddings": False,
        "activation": "gelu_tanh",
        "init_method": init,
        "output_layer_init_method": output_init,
    }


def pythia(name: str) -> dict[str, Any]:
    """The preset `pythia-<size>`, with -deduped, -v0 or the name of another batch at its end;
    without data: see `data.train`."""
    key = name.removeprefix("pythia-").split("-")[0]
    size = SIZES[key]
    # The first 1b was trained in fp16, as its file says.
    precision = "bf16" if name in ("pythia-1b", "pythia-1b-0.5MtokBS") else "fp16"
    values = {
        "recipe": name,
        "output": f"runs/{name}",
        "seed": 1234,
        "precision": precision,
        "model": model(size, precision),
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
    if name.endswith("-v0"):
        return merge(values, of_v0(key))
    if name.endswith("MtokBS"):
        return merge(values, of_batch(SMALLER_BATCHES[key][1]))
    return values


def of_v0(size: str) -> dict[str, Any]:
    """In what the first version of a size differs."""
    # Its checkpoints begin at the first multiple: there was no step 0.
    values: dict[str, Any] = {"checkpoint": {"steps": []}}
    if size in V0_LARGE_BATCH:
        values = merge(values, of_batch(V0_BATCH))
        values["schedule"] = {"decay_steps": V0_DECAY}
    if size in V0_RATE_TO_ZERO:
        values["schedule"] = {"min_lr": 0.0}
    return values


def of_batch(batch: Batch) -> dict[str, Any]:
    """Rows, steps, and checkpoints after as many tokens as with the usual batch."""
    return {
        "train": {"steps": batch.steps, "batch_size": batch.rows},
        "schedule": {"decay_steps": batch.steps},
        "checkpoint": {"every": 1000 * batch.steps // STEPS},
    }


NAMES = [f"pythia-{size}{data}" for size in SIZES for data in ("", "-deduped")]
VARIANTS = [
    *(f"pythia-{size}{data}-v0" for size in V0_SIZES for data in ("", "-deduped")),
    *(f"pythia-{size}-{end}" for size, (end, _) in SMALLER_BATCHES.items()),
]
"""Presets of the first versions and of the runs with smaller batches."""


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
