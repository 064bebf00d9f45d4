"""Optimizers: the registry and its members. `updater.py` applies them to a model, by pattern of
parameter names.

Needs no torch, so that a config stays quick to load: a member `lion.py` declares, and what needs
torch stands in `lion_step.py`.
"""

from castalia.optim.adafactor import Adafactor, AdafactorConfig
from castalia.optim.adam import Adam, AdamConfig
from castalia.optim.adamw import AdamW, AdamWConfig
from castalia.optim.adamw8bit import AdamW8bit, AdamW8bitConfig
from castalia.optim.base import Member, StateTensor, Weight
from castalia.optim.config import OPTIMIZERS, GroupConfig, OptimConfig
from castalia.optim.groups import Rules, UpdateRule
from castalia.optim.lion import Lion, LionConfig
from castalia.optim.madgrad import Madgrad, MadgradConfig
from castalia.optim.muon import Muon, MuonConfig
from castalia.optim.schedule_free import ScheduleFree, ScheduleFreeConfig
from castalia.optim.sgd import SGD, SGDConfig
from castalia.optim.sm3 import SM3, SM3Config
from castalia.optim.soap import SOAP, SOAPConfig
from castalia.optim.widths import WidthPowers, width_rule

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "SM3",
    "SOAP",
    "Adafactor",
    "AdafactorConfig",
    "Adam",
    "AdamConfig",
    "AdamW",
    "AdamW8bit",
    "AdamW8bitConfig",
    "AdamWConfig",
    "GroupConfig",
    "Lion",
    "LionConfig",
    "Madgrad",
    "MadgradConfig",
    "Member",
    "Muon",
    "MuonConfig",
    "OptimConfig",
    "Rules",
    "SGDConfig",
    "SM3Config",
    "SOAPConfig",
    "ScheduleFree",
    "ScheduleFreeConfig",
    "StateTensor",
    "UpdateRule",
    "Weight",
    "WidthPowers",
    "width_rule",
]
