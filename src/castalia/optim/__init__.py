"""Optimizers: the registry and its members. `updater.py` applies them to a model, by pattern of
parameter names.

Needs no torch, so that a config stays quick to load.
"""

from castalia.optim.adamw import AdamW, AdamWConfig
from castalia.optim.base import Member, StateTensor
from castalia.optim.config import OPTIMIZERS, GroupConfig, OptimConfig
from castalia.optim.groups import Rules, UpdateRule
from castalia.optim.widths import WidthPowers, width_rule

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "AdamWConfig",
    "GroupConfig",
    "Member",
    "OptimConfig",
    "Rules",
    "StateTensor",
    "UpdateRule",
    "WidthPowers",
    "width_rule",
]
