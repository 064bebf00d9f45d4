"""Which parameters train, and how each is updated: decided by name alone, so that every rank
decides alike."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from castalia.core.errors import ConfigError
from castalia.optim.base import Weight
from castalia.optim.config import OptimConfig
from castalia.optim.widths import WidthRule

BLOCKS = "layers."
"""Begin of the names of the parameters in a model's blocks."""
STACKS = "layers.*.mlp.experts.*"
"""Names of the stacks of experts' matrices, each of which is a matrix of a block by itself."""


class UpdateRule(NamedTuple):
    """How a parameter is updated."""

    kind: str
    lr_scale: float
    weight_decay: float


class Rules:
    """The rule of each parameter of a model, by its name.

    `no_decay` are the family's patterns of parameters without weight decay, `frozen` those that do
    not train; `only`, where given, those outside of which nothing trains, as of an adapter;
    `widths` are the factors of μP.
    """

    def __init__(
        self,
        config: OptimConfig,
        no_decay: Sequence[str] = (),
        frozen: Sequence[str] = (),
        only: Sequence[str] = ("*",),
        widths: WidthRule | None = None,
    ) -> None:
        self.config = config
        self.widths = widths
        self.no_decay = no_decay
        self.frozen = frozen
        self.only = only

    def trains(self, name: str) -> bool:
        """Whether the parameter is updated at all."""
        return matches(name, self.only) and not matches(name, self.frozen)

    def rule(self, name: str) -> UpdateRule:
        """Kind, rate and decay of a parameter that trains."""
        kind = self.config.kind
        lr_scale = 1.0
        decay = 0.0 if matches(name, self.no_decay) else self.config.weight_decay
        for group in self.config.groups:
            if fnmatchcase(name, group.pattern):
                kind = group.kind or kind
                lr_scale = group.lr_scale
                # A decay that the group states holds also where the family has none: it was asked
                # for by name.
                if group.weight_decay is not None:
                    decay = group.weight_decay
                break
        if self.widths is not None:
            by_width = self.widths.factor(kind, name)
            lr_scale *= by_width
            # Optimizers multiply decay and rate. What a step decays is not to follow the width, as
            # in the optimizers of the mup package.
            decay /= by_width
        return UpdateRule(kind, lr_scale, decay)

    def weight(self, name: str, shape: Sequence[int]) -> Weight:
        """The parameter `name` of the whole shape `shape`, as the rules of the state see it."""
        # What the family exempts from decay is no matrix product, whatever its shape.
        matrices = len(shape) == 2 or (len(shape) == 3 and fnmatchcase(name, STACKS))
        hidden = name.startswith(BLOCKS) and matrices and not matches(name, self.no_decay)
        return Weight(name, tuple(shape), hidden)

    def config_of(self, kind: str) -> OptimConfig:
        """The config of an optimizer: the section's own, or the options of the group that names
        another."""
        return self.config.config_of(kind)

    def require_matches(self, names: Iterable[str]) -> None:
        """Every pattern must match a parameter of the whole model, and one parameter at least must
        train.

        Raises  ConfigError naming the pattern.
        """
        known = list(names)
        patterns = {f"optim.groups: {group.pattern}": group.pattern for group in self.config.groups}
        patterns |= {f"train.frozen: {pattern}": pattern for pattern in self.frozen}
        for label, pattern in patterns.items():
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(
                    f"{label} matches no parameter;"
                    f" their names look like {known[0]} and {known[-1]}"
                )
        if not any(self.trains(name) for name in known):
            raise ConfigError(
                "train.frozen matches every parameter that would train, so nothing is left"
            )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the shell patterns matches the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
