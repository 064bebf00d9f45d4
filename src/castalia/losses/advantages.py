"""Advantages: how much better an answer is than others, from the rewards of groups of answers.

A group is the answers to one prompt.
"""

from collections.abc import MutableSequence
from typing import Literal

import torch
from torch import Tensor

HISTORY = 100
"""Groups whose mean rewards make up the running baseline, as in GPT-NeoX."""
SMALLEST_STD = 1e-4
"""Added to the standard deviation, as in TRL."""

Scale = Literal["group", "batch", "none"]


def group_advantages(rewards_PG: Tensor, scale: Scale) -> Tensor:
    """Rewards less the mean of their group, over a standard deviation.

    Shapes  (P, G), P prompts with G answers each -> (P, G).
    Takes   scale: whose standard deviation, with Bessel's correction, divides; a single number
            has one of 0.
    Source  Shao et al. 2024, arXiv:2402.03300, section 4.1.2; `none` is Liu et al. 2025,
            arXiv:2503.20783, and `batch` Liu et al. 2025, arXiv:2508.08221.
    """
    advantages = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if scale == "none":
        return advantages
    if scale == "group":
        std = deviation(rewards_PG, 1)[:, None]
    else:
        std = deviation(rewards_PG.flatten(), 0)
    return advantages / (std + SMALLEST_STD)


def deviation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation along a dimension with Bessel's correction; 0 for a single value."""
    if values.shape[dim] < 2:
        return torch.zeros_like(values.sum(dim))
    return values.std(dim)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Rewards less the mean reward of the other answers to the same prompt, (P, G), G > 1.

    Source  Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free".
    """
    count = rewards_PG.shape[1]
    others = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (count - 1)
    return rewards_PG - others


def over_running_mean(rewards_PG: Tensor, history: MutableSequence[float]) -> Tensor:
    """Rewards less the mean of the groups before, (P, G); 0 before the first group.

    `history` are the mean rewards of the last groups, at most HISTORY; those of these groups are
    added.
    Source  GPT-NeoX, megatron/data/online_dataset.py:85-101.
    """
    advantages = torch.empty_like(rewards_PG)
    for group, rewards in enumerate(rewards_PG):
        # Before the group itself is added: its own rewards must not be in its baseline.
        baseline = sum(history) / len(history) if history else 0.0
        advantages[group] = rewards - baseline
        history.append(float(rewards.mean()))
        del history[:-HISTORY]
    return advantages
