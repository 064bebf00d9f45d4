"""Checkpoints: safetensors shards and JSON manifests, whole or absent, hashed, never pickled.

Modules that need torch are imported on first use, so that a config alone loads quickly.
"""

from typing import TYPE_CHECKING

from castalia.checkpoint.config import PYTHIA_EARLY, CheckpointConfig
from castalia.core.lazy import lazy

if TYPE_CHECKING:
    from castalia.checkpoint.find import complete_steps, find_checkpoint, newest_first
    from castalia.checkpoint.load import (
        load_into,
        read,
        read_config,
        read_model,
        read_state,
        verify,
    )
    from castalia.checkpoint.manifest import DamagedCheckpointError
    from castalia.checkpoint.policy import SavePolicy
    from castalia.checkpoint.store import SaveTiming, Store

__all__ = [
    "PYTHIA_EARLY",
    "CheckpointConfig",
    "DamagedCheckpointError",
    "SavePolicy",
    "SaveTiming",
    "Store",
    "complete_steps",
    "find_checkpoint",
    "load_into",
    "newest_first",
    "read",
    "read_config",
    "read_model",
    "read_state",
    "verify",
]

PLACES = {
    "DamagedCheckpointError": "manifest",
    "SavePolicy": "policy",
    "SaveTiming": "store",
    "Store": "store",
    "complete_steps": "find",
    "find_checkpoint": "find",
    "load_into": "load",
    "newest_first": "find",
    "read": "load",
    "read_config": "load",
    "read_model": "load",
    "read_state": "load",
    "verify": "load",
}
__getattr__ = lazy(__name__, PLACES)
