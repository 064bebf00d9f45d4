"""Which options of experts another program has, compared with those that a model uses.

A program declares the values that it can express, by option. Every option that it does not name
must have its default, so that one that is added later is refused until it is named.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from castalia.experts.config import MoeConfig

IN_TRAINING = frozenset(
    {
        "balance_loss",
        "z_loss",
        "jitter",
        "group",
        "router",
        "capacity_factor",
        "split_over_tp",
    }
)
"""Options that do not say what a trained model computes. Sinkhorn balances in training alone."""
SIZES = ("experts", "top_k")
"""Options that every program has."""


def computed(moe: MoeConfig, expert_size: int) -> dict[str, Any]:
    """The section as a trained model's computation needs it; `expert_size` is that in effect."""
    values = moe.model_dump(mode="json", exclude=set(IN_TRAINING))
    values["expert_size"] = expert_size
    # The rate is one of training; that there is a bias is not.
    values["bias_rate"] = moe.bias_rate > 0
    if moe.eval_capacity_factor is None:
        del values["min_capacity"]
    return values


def unexpressed_experts(
    moe: MoeConfig, table: Mapping[str, Collection[object] | None]
) -> Iterator[str]:
    """Every option in effect that `table` lacks, as moe.NAME=VALUE; None there means any value."""
    for name, field in MoeConfig.model_fields.items():
        value = getattr(moe, name)
        if name in IN_TRAINING or name in SIZES:
            continue
        if name == "min_capacity" and moe.eval_capacity_factor is None:
            continue
        if name not in table:
            lacking = value != field.get_default(call_default_factory=True)
        else:
            values = table[name]
            lacking = values is not None and value not in values
        if lacking:
            yield f"moe.{name}={json.dumps(value)}"
