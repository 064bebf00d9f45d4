"""Start values of parameters as data. A family maps name patterns to them.

A start is called with a shape and a seeded torch.Generator and returns a float32 tensor of that
shape; a family may give a function of its own. torch is imported when a start draws, so that
families stay quick to import.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Generator, Tensor

Start = Callable[[tuple[int, ...], "Generator"], "Tensor"]
Init = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init"
]
"""GPT-NeoX's names of normal distributions; see `init_std`."""


@dataclass(frozen=True)
class Normal:
    """Mean 0 and standard deviation `std`."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        import torch

        return torch.randn(shape, generator=generator).mul_(self.std)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Fill a tensor."""
        import torch

        return torch.full(shape, self.value)


ZEROS = Constant(0.0)
ONES = Constant(1.0)


def init_std(method: Init, width: int, layers: int, std: float) -> float:
    """Standard deviation of the normal distribution that `method` names; L layers, h wide, s = std.

    normal s, scaled_normal s / sqrt(2L), single_residual_scaled_normal s / sqrt(L),
    small_init sqrt(2 / 5h), wang_init 2 / (L sqrt(h)).
    Source  Megatron-LM, arXiv:1909.08053 (scaled_normal); Nguyen and Salazar 2019, arXiv:1910.05895
            (small_init); GPT-J (wang_init); all as in GPT-NeoX, megatron/model/init_functions.py.
    """
    return {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * layers),
        "single_residual_scaled_normal": std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / (layers * math.sqrt(width)),
    }[method]
