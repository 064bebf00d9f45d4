"""Mixers with fixed shares."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import MIXERS, Mixer
from castalia.mixing.simplex import Vector, fill, normalise, read_sizes


class Fixed(Mixer):
    """Base of the mixers that keep their initial shares."""

    needs = frozenset[str]()

    def known(self, step: int) -> Vector | None:
        """The same shares at every step."""
        return self.weights()


@MIXERS.register("static")
class Static(Fixed):
    """The prior; uniform by default."""

    kind = "static"


@MIXERS.register("uniform")
class Uniform(Fixed):
    """1 / K each, regardless of the prior."""

    kind = "uniform"

    def __init__(
        self, sources: Sequence[str], *, prior: ArrayLike | Mapping[str, float] | None = None
    ) -> None:
        super().__init__(sources, prior=prior)
        self.shares = np.full(len(self.sources), 1 / len(self.sources))


class Sized(Fixed):
    """Base of the mixers that follow the sizes of the sources.

    Sizes are in tokens or rows; only their proportions matter.
    """

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
                f"mixer {self.kind!r} needs the sizes of the sources; pass sizes=, in tokens"
            )
        self.sizes = read_sizes(sizes, self.sources)


@MIXERS.register("natural")
class Natural(Sized):
    """p_i = n_i / sum n: every token is read equally often."""

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

    Source  Devlin 2018 (multilingual BERT); Conneau et al. 2020, arXiv:1911.02116, whose alpha is
            1 / temperature.
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
                f"temperature: expected > 0, got {temperature}; 1 is natural, larger is more"
                " uniform"
            )
        # Sizes relative to the largest, so that a small temperature cannot overflow.
        self.shares = normalise((self.sizes / self.sizes.max()) ** (1 / temperature))


@MIXERS.register("unimax")
class Unimax(Sized):
    """As uniform as possible while no source is read more than `max_epochs` times.

    Starting from the smallest source, each gets an equal part of the remaining budget, capped at
    max_epochs times its size. sizes and budget share one unit.

    Raises  ConfigError if max_epochs passes over all sources are less than the budget.
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
                "mixer 'unimax' needs budget= or horizon=, the tokens of the whole run,"
                f" got {budget}"
            )
        if not max_epochs > 0:
            raise ConfigError(f"unimax: expected max_epochs > 0, got {max_epochs}")
        most = max_epochs * self.sizes
        if most.sum() < budget * (1 - 1e-9):
            raise ConfigError(
                f"unimax: {max_epochs:g} epochs of all sources are {most.sum():g} tokens, but the"
                f" run needs {budget:g}; set max_epochs to"
                f" {budget / max(self.sizes.sum(), 1):.3g} or more"
            )
        self.shares = normalise(fill(most, float(budget)))
