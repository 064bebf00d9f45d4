"""Adapters: a few trained parameters over a frozen model. Importing this package does not import
torch.

`adapt` gives a model that is still on the meta device its adapter; `ADAPTERS` has the kinds.
"""

from typing import TYPE_CHECKING

from castalia.adapters.bitfit import BitFit
from castalia.adapters.config import (
    ADAPTERS,
    Adapter,
    AdapterConfig,
    NoAdapter,
    adapter_of,
    build_adapter_config,
    trained_patterns,
)
from castalia.adapters.lora import Dora, Lora, LoraConfig
from castalia.adapters.prompt import SoftPrompt
from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.adapters.adapting import adapt
    from castalia.adapters.switch import disabled

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "BitFit",
    "Dora",
    "Lora",
    "LoraConfig",
    "NoAdapter",
    "SoftPrompt",
    "adapt",
    "adapter_of",
    "build_adapter_config",
    "disabled",
    "trained_patterns",
]

__getattr__ = lazy(__name__, {"adapt": "adapting", "disabled": "switch"})
