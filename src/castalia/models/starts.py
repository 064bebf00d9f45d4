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
    "normal",
    "scaled_normal",
    "single_residual_scaled_normal",
    "small_init",
    "wang_init",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
]
"""GPT-NeoX's names of start distributions; see `drawn`."""


@dataclass(frozen=True)
class Normal:
    """Mean 0 and standard deviation `std`."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        import torch

        return torch.randn(shape, generator=generator).mul_(self.std)

    def deviation(self, shape: tuple[float, ...]) -> float:
        """Standard deviation of the elements of a matrix of this shape."""
        return self.std


@dataclass(frozen=True)
class Orthogonal:
    """Rows or columns, whichever are fewer, of norm `gain` at right angles to each other.

    Source  Saxe et al. 2013, arXiv:1312.6120.
    """

    gain: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a matrix."""
        import torch

        matrix = torch.empty(shape)
        return torch.nn.init.orthogonal_(matrix, self.gain, generator=generator)

    def deviation(self, shape: tuple[float, ...]) -> float:
        """Root mean square of the elements of a matrix of this shape."""
        return self.gain / math.sqrt(max(shape))


@dataclass(frozen=True)
class Xavier:
    """Mean 0 and variance 2 / (inputs + outputs), uniform or normal.

    Source  Glorot and Bengio 2010.
    """

    uniform: bool

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a matrix."""
        import torch

        draw = torch.nn.init.xavier_uniform_ if self.uniform else torch.nn.init.xavier_normal_
        return draw(torch.empty(shape), generator=generator)

    def deviation(self, shape: tuple[float, ...]) -> float:
        """Standard deviation of the elements of a matrix of this shape."""
        return math.sqrt(2 / sum(shape))


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        import torch

        return torch.empty(shape).uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class StepBias:
    """Biases whose softplus, a time step, is log-uniform between `least` and `greatest`.

    Source  Gu and Dao 2023, arXiv:2312.00752, section 3.6; GPT-NeoX, megatron/model/mamba/mamba.py.
    """

    least: float
    greatest: float
    floor: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        import torch

        bounds = math.log(self.least), math.log(self.greatest)
        steps = torch.empty(shape).uniform_(*bounds, generator=generator)
        steps = steps.exp_().clamp_(min=self.floor)
        # The inverse of softplus.
        return steps + torch.log(-torch.expm1(-steps))


@dataclass(frozen=True)
class LogCount:
    """log 1, log 2, … along the last dim: the decays of S4D-real.

    Source  Gu et al. 2022, arXiv:2206.11893, equation 9.
    """

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Fill a tensor."""
        import torch

        counts = torch.arange(1, shape[-1] + 1, dtype=torch.float32)
        return counts.log().expand(shape).clone()


@dataclass(frozen=True)
class LogUniform:
    """The logarithm of numbers that are uniform between `least` and `greatest`."""

    least: float
    greatest: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        import torch

        return torch.empty(shape).uniform_(self.least, self.greatest, generator=generator).log_()


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Fill a tensor."""
        import torch

        return torch.full(shape, self.value)


@dataclass(frozen=True)
class AtWidth:
    """The start of a parameter of μP's base width, with the deviation that a model `ratio` times as
    wide needs.

    Source  Yang et al. 2022, arXiv:2203.03466, table 8: the variance of matrices between two widths
            falls with the inputs, that of all other parameters stays.
    """

    base: Start
    ratio: float
    hidden: bool
    """Whether both dims of the matrix grow with the width."""
    scale: float

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw a tensor."""
        values = self.base(shape, generator)
        if not isinstance(self.base, Normal | Orthogonal | Xavier):
            # A constant; and of a start of a family's own nothing is known.
            return values
        return values.mul_(self.scale * self.deviation(shape) / self.base.deviation(shape))

    def deviation(self, shape: tuple[int, ...]) -> float:
        """Standard deviation of the elements, before `scale`."""
        assert isinstance(self.base, Normal | Orthogonal | Xavier)
        rows, *rest = shape
        # The rows of an embedding, a head or a table of positions have one number at every width.
        narrow = (rows / self.ratio if self.hidden else rows, *(n / self.ratio for n in rest))
        there = self.base.deviation(narrow)
        return there / math.sqrt(self.ratio) if self.hidden else there


@dataclass(frozen=True)
class Stacked:
    """A stack of matrices, as of experts, each with the start `each`."""

    each: Start

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Draw one matrix after the other."""
        import torch

        return torch.stack([self.each(shape[1:], generator) for _ in range(shape[0])])


ZEROS = Constant(0.0)
ONES = Constant(1.0)


def drawn(method: Init, width: int, layers: int, std: float) -> Start:
    """The start that `method` names, of a model L layers deep and h wide, with s = std.

    Normal with deviation: normal s, scaled_normal s / sqrt(2L), single_residual_scaled_normal
    s / sqrt(L), small_init sqrt(2 / 5h), wang_init 2 / (L sqrt(h)). Orthogonal with gain:
    orthogonal sqrt(2), scaled_orthogonal sqrt(2 / L).

    Source  Megatron-LM, arXiv:1909.08053 (scaled_normal); Nguyen and Salazar 2019, arXiv:1910.05895
            (small_init); GPT-J (wang_init); all as in GPT-NeoX, megatron/model/init_functions.py.
            Its orthogonal always fails at a division by 0; the gain here is that of its default.
    """
    starts: dict[Init, Start] = {
        "normal": Normal(std),
        "scaled_normal": Normal(std / math.sqrt(2 * layers)),
        "single_residual_scaled_normal": Normal(std / math.sqrt(layers)),
        "small_init": Normal(math.sqrt(2 / (5 * width))),
        "wang_init": Normal(2 / (layers * math.sqrt(width))),
        "orthogonal": Orthogonal(math.sqrt(2)),
        "scaled_orthogonal": Orthogonal(math.sqrt(2 / layers)),
        "xavier_uniform": Xavier(uniform=True),
        "xavier_normal": Xavier(uniform=False),
    }
    return starts[method]
