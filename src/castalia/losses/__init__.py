"""Losses: one file each, chosen by `loss.kind`. Importing this package does not import torch."""

from typing import TYPE_CHECKING

from castalia.core.lazy import lazy
from castalia.losses.dpo import DPO
from castalia.losses.grpo import Grpo
from castalia.losses.kto import KTO
from castalia.losses.loss import LOSSES, Loss, LossConfig, LossOut, Mean
from castalia.losses.next_token import NextToken
from castalia.losses.orpo import ORPO
from castalia.losses.reinforce import Reinforce
from castalia.losses.reward import Reward
from castalia.losses.simpo import SimPO

if TYPE_CHECKING:
    from castalia.losses.scored import Scored

__all__ = [
    "DPO",
    "KTO",
    "LOSSES",
    "ORPO",
    "Grpo",
    "Loss",
    "LossConfig",
    "LossOut",
    "Mean",
    "NextToken",
    "Reinforce",
    "Reward",
    "Scored",
    "SimPO",
]

__getattr__ = lazy(__name__, {"Scored": "scored"})
