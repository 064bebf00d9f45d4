"""Weights at the start: GPT-NeoX's distributions, drawn so that no layout of processes changes them."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.models.config import Init, ModelConfig

OUTPUT_LAYERS = ("attn.out.weight", "mlp.down.weight")


def init_std(method: Init, config: ModelConfig) -> float:
    """Standard deviation of the normal distribution that `method` names; L layers, h wide, s = init_method_std.

    normal s, scaled_normal s / sqrt(2L), single_residual_scaled_normal s / sqrt(L), small_init sqrt(2 / 5h),
    wang_init 2 / (L sqrt(h)).
    Source  Megatron-LM, arXiv:1909.08053 (scaled_normal); Nguyen and Salazar 2019, arXiv:1910.05895 (small_init);
            GPT-J (wang_init); all as in GPT-NeoX, megatron/model/init_functions.py.
    """
    h, L, s = config.hidden_size, config.num_layers, config.init_method_std
    return {
        "normal": s,
        "scaled_normal": s / math.sqrt(2 * L),
        "single_residual_scaled_normal": s / math.sqrt(L),
        "small_init": math.sqrt(2 / (5 * h)),
        "wang_init": 2 / (L * math.sqrt(h)),
    }[method]


def init_parameter(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The whole start value of the parameter `name` of a Decoder, float32 on the CPU.

    A pure function of its arguments: a process that owns a part of the parameter takes that slice of the result.
    Biases are 0, norm weights 1; attn.out and mlp.down follow output_layer_init_method, all others init_method.
    """
    if name.endswith("bias"):
        return torch.zeros(tuple(shape))
    if len(shape) == 1:
        return torch.ones(tuple(shape))
    method = config.output_layer_init_method if name.endswith(OUTPUT_LAYERS) else config.init_method
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    return torch.randn(tuple(shape), generator=generator).mul_(init_std(method, config))


def parameter_seed(seed: int, name: str) -> int:
    """63 bits out of (seed, name), the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
