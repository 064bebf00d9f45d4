"""Weights at the start, drawn so that no layout of ranks changes them."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig


def start_weights(config: ModelConfig, seed: int) -> Callable[[str, Sequence[int]], Tensor]:
    """(name, shape) -> start value of the whole parameter; for `distributed.initialize`."""
    return lambda name, shape: init_parameter(name, shape, config, seed)


def init_parameter(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The whole start value of the parameter `name` of a Decoder, float32 on the CPU.

    A pure function of its arguments. A rank that holds a slice of the parameter takes that slice of
    the result, so the weights do not depend on device, order of the draws or layout.
    Raises  ConfigError if the family declares no start for `name`.
    """
    # Always drawn on the CPU: a GPU's generator gives other numbers for the same seed.
    start = family_of(config).start_of(config, name)
    whole = start(tuple(shape), torch.Generator().manual_seed(parameter_seed(seed, name)))
    assert whole.shape == tuple(shape), f"the start of {name} has shape {tuple(whole.shape)}"
    return whole


def parameter_seed(seed: int, name: str) -> int:
    """63 bits out of (seed, name)."""
    # Python's own hash of a string differs from process to process.
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
