"""Learning rates by width under μP, from what each optimizer declares. Needs no torch."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.models.families import family_of
from castalia.models.model_config import ModelConfig
from castalia.optim.config import OPTIMIZERS, OptimConfig


class WidthPowers(NamedTuple):
    """Powers of the width that an optimizer's learning rates follow under μP.

    Hidden are matrices between two widths, whose update must have elements that fall with the
    inputs; all other parameters' updates keep their size. A gradient's elements fall with the
    width everywhere, hence the powers of an optimizer that normalizes them, and of one that does
    not.
    Source  Yang et al. 2022, arXiv:2203.03466, table 8.
    """

    hidden: float
    other: float


ADAM_LIKE = WidthPowers(-1.0, 0.0)
"""An update's elements have one size whatever the gradient's."""
SGD_LIKE = WidthPowers(0.0, 1.0)
"""An update is proportional to the gradient."""


RELATIVE = WidthPowers(-0.5, 0.0)
"""An update is as large as Adam's times the root mean square of the parameter, which falls with the
root of the inputs in matrices between two widths; or its largest singular value, which must have
one size, is its root mean square times the root of the width."""
CUBE_ROOT = WidthPowers(-1.0, 0.5)
"""An update is the cube root of the gradient, times lr to the power of 2/3."""


class WidthRule(NamedTuple):
    """Factors on the learning rate of a model's parameters."""

    ratio: float
    """The width as a multiple of the base; that of the whole model, however ranks split it."""
    is_hidden: Callable[[str], bool]
    """Of a parameter's name."""
    powers: Mapping[str, WidthPowers]
    """Of each optimizer of the run, by its name."""

    def factor(self, kind: str, name: str) -> float:
        """Factor on the rate of the parameter `name` under the optimizer `kind`."""
        powers = self.powers[kind]
        return float(self.ratio ** (powers.hidden if self.is_hidden(name) else powers.other))


def width_rule(model: ModelConfig, optim: OptimConfig) -> WidthRule | None:
    """The rule of a model under μP; None without it.

    Raises  ConfigError for an optimizer that does not say how its rates follow the width.
    """
    if model.mup is None:
        return None
    powers = {}
    for kind in sorted({optim.kind, *(group.kind or optim.kind for group in optim.groups)}):
        found: WidthPowers | None = OPTIMIZERS[kind].width_powers(optim.config_of(kind))
        if found is None:
            known = ", ".join(name for name in OPTIMIZERS if OPTIMIZERS[name].by_width is not None)
            raise ConfigError(
                f"model.mup: optim.kind {kind} does not say how its learning rates follow the"
                f" width; use one of {known}, or declare by_width in its class"
            )
        powers[kind] = found
    family = family_of(model)
    return WidthRule(model.width_ratio, lambda name: family.is_hidden(model, name), powers)
