"""Reward functions by name: `module:function`. Importing this module does not import torch."""

from collections.abc import Callable, Sequence

from castalia.core.functions import named_function

Function = Callable[..., Sequence[float | None]]


def reward_function(name: str) -> Function:
    """The function that `module:function` names.

    Raises  ConfigError saying which part could not be imported.
    """
    return named_function(name, "loss.rewards", "rewards:is_short")
