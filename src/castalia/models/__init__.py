"""Decoder-only language models in plain PyTorch: families, start weights, state, parameter and FLOP
counts.

What needs torch is imported when it is asked for, so that a config alone stays quick to load.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.models.config import TransformerConfig
from castalia.models.families import FAMILIES, build_model_config, family_of
from castalia.models.families.neox import NeoxConfig
from castalia.models.flops import ParameterCounts, flops_per_token, parameter_counts
from castalia.models.model_config import ModelConfig

if TYPE_CHECKING:
    from castalia.models.block import Block
    from castalia.models.context import Context
    from castalia.models.decoder import Decoder
    from castalia.models.init import init_parameter
    from castalia.models.state import KVCache, LayerState, ModelState

__all__ = [
    "FAMILIES",
    "Block",
    "Context",
    "Decoder",
    "KVCache",
    "LayerState",
    "ModelConfig",
    "ModelState",
    "NeoxConfig",
    "ParameterCounts",
    "TransformerConfig",
    "build_model_config",
    "family_of",
    "flops_per_token",
    "init_parameter",
    "parameter_counts",
]

PLACES = {
    "Block": "block",
    "Context": "context",
    "Decoder": "decoder",
    "KVCache": "state",
    "LayerState": "state",
    "ModelState": "state",
    "init_parameter": "init",
}
__getattr__ = lazy(__name__, PLACES)
