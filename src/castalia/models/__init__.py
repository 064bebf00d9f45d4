"""Plain PyTorch models of the GPT-NeoX family, their start weights, KV cache, parameter and FLOP counts.

What needs torch is imported when it is asked for, so that a config alone stays quick to load.
"""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.models.config import ModelConfig
from castalia.models.flops import ParameterCounts, flops_per_token, parameter_counts

if TYPE_CHECKING:
    from castalia.models.decoder import Block, Decoder
    from castalia.models.init import init_parameter
    from castalia.models.state import KVCache, LayerState, ModelState

__all__ = [
    "Block",
    "Decoder",
    "KVCache",
    "LayerState",
    "ModelConfig",
    "ModelState",
    "ParameterCounts",
    "flops_per_token",
    "init_parameter",
    "parameter_counts",
]

PLACES = {
    "Block": "decoder",
    "Decoder": "decoder",
    "KVCache": "state",
    "LayerState": "state",
    "ModelState": "state",
    "init_parameter": "init",
}
__getattr__ = lazy(__name__, PLACES)
