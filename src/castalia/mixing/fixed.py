"""Mixers whose shares no loss can change."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, fill, normalise, read_sizes


class Fixed(Mixer):
    """Base of the mixers that stay as they start."""

    needs = frozenset[str]()

    def known(self, step: int) -> Vector | None:
        """The same at every step."""
        return self.weights()


@MIXERS.register("static")
class Static(Fixed):
    """The prior, as it was given; uniform without one."""

    kind = "static"


@MIXERS.register("uniform")
class Uniform(Fixed):
    """1 / K each, whatever the prior."""

    kind = "uniform"

    def __init__(
        self, sources: Sequence[str], *, prior: ArrayLike | Mapping[str, float] | None = None
    ) -> None:
        super().__init__(sources, prior=prior)
        self.shares = np.full(len(self.sources), 1 / len(self.sources))


class Sized(Fixed):
    """Base of the mixers that follow the sizes of the sources, in tokens (or rows: only proportions matter)."""

    def __init__(
        self,
        sources: Sequence[str],
        *,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, prior=prior)
        if sizes is None:
            raise ConfigError(
                f"mixer {self.kind!r} follows the sizes of the sources; pass sizes=, in tokens"
            )
        self.sizes = read_sizes(sizes, self.sources)


@MIXERS.register("natural")
class Natural(Sized):
    """p_i = n_i / sum n: every token is seen equally often."""

    kind = "natural"

    def __init__(
        self,
        sources: Sequence[str],
        *,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, sizes=sizes, prior=prior)
        self.shares = normalise(self.sizes)


@MIXERS.register("temperature")
class Temperature(Sized):
    """p_i proportional to n_i ** (1 / temperature): 1 is natural, infinity uniform.

    Source  Devlin 2018 (multilingual BERT); Conneau et al. 2020, arXiv:1911.02116, whose alpha is 1 / temperature.
    """

    kind = "temperature"

    def __init__(
        self,
        sources: Sequence[str],
        *,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        temperature: float = 2.0,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, sizes=sizes, prior=prior)
        if not temperature > 0:
            raise ConfigError(
                f"temperature: expected > 0, got {temperature}; 1 is natural, larger is more uniform"
            )
        self.shares = normalise((self.sizes / self.sizes.max()) ** (1 / temperature))


@MIXERS.register("unimax")
class Unimax(Sized):
    """As uniform as no source being read more than `max_epochs` times allows.

    From the smallest source on, each gets an even part of the budget that is left, at most max_epochs times its size.
    sizes and budget have the same unit.

    Raises  ConfigError if even max_epochs passes over everything are less than the budget.
    Source  Chung et al. 2023, arXiv:2304.09151, algorithm 1.
    """

    kind = "unimax"

    def __init__(
        self,
        sources: Sequence[str],
        *,
        sizes: ArrayLike | Mapping[str, float] | None = None,
        budget: float | None = None,
        max_epochs: float = 4.0,
        prior: ArrayLike | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(sources, sizes=sizes, prior=prior)
        if budget is None or not budget > 0:
            raise ConfigError(
                f"mixer 'unimax' needs budget= or horizon=, the tokens of the whole run, got {budget}"
            )
        if not max_epochs > 0:
            raise ConfigError(f"unimax: expected max_epochs > 0, got {max_epochs}")
        most = max_epochs * self.sizes
        if most.sum() < budget * (1 - 1e-9):
            raise ConfigError(
                f"unimax: {max_epochs:g} epochs of everything are {most.sum():g} tokens, the run takes {budget:g};"
                f" max_epochs={budget / max(self.sizes.sum(), 1):.3g} or more fits"
            )
        self.shares = normalise(fill(most, float(budget)))
