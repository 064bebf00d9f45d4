"""`Mixer`: what every mixer is. It turns losses into shares, and knows no random numbers and no data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import CheckpointError, TrainingError
from castalia.core.registry import Registry
from castalia.mixing.simplex import Vector, check_sources, normalise, read_shares
from castalia.mixing.states import read_state, write_state
from castalia.mixing.stats import Stats, vector

HUGE = 50.0
"""Nats a token above which a loss is refused: a uniform guess among 2**72 tokens has less."""
MIXERS: Registry[type["Mixer"]] = Registry("mixer")
"""Every mixer by name."""


class Mixer:
    """Shares of K sources that follow what is observed.

    `observe` is called once a step, in order, with the same numbers on every process. `weights()` is the distribution
    for the next step: >= 0, sums to 1, read only. A subclass changes `shares` in `update` and names what it must keep.
    A loss that is not finite or above 50 nats is never used; `rejected` counts these by source.
    """

    kind = "mixer"
    needs: frozenset[str] = frozenset({"train_loss"})
    """What it learns from, of train_loss, val_loss, step; empty for one whose shares never change."""
    per_source: tuple[str, ...] = ("shares", "rejected")
    """Attributes of shape (K,) or (K, n) that make up its state."""
    scalars: tuple[str, ...] = ()
    """Attributes that are single numbers and make up its state."""
    collects = True
    """It learns during warm-up and between updates; False where its authors' code does not."""

    def __init__(
        self, sources: Sequence[str], *, prior: ArrayLike | Mapping[str, float] | None = None
    ) -> None:
        self.sources = check_sources(sources)
        self.prior = read_shares(prior, self.sources)
        self.step = 0
        self.shares = self.prior
        self.rejected = np.zeros(len(self.sources), np.int64)
        self.ones = np.ones(len(self.sources))
        self.inner: list[Mixer] = []
        self.settings: dict[str, Any] = {}

    def observe(self, stats: Stats) -> None:
        """Learn from one step.

        Raises  TrainingError if a vector has the wrong length or the step does not follow.
        """
        if stats.step < 1:
            raise TrainingError(
                f"mixer {self.kind!r} got the stats of step {stats.step}; steps count from 1"
            )
        if stats.step <= self.step:
            raise TrainingError(
                f"mixer {self.kind!r} has seen step {self.step} and got the stats of step {stats.step};"
                " observe each step once, in order"
            )
        self.step = stats.step
        self.update(stats)

    def update(self, stats: Stats) -> None:
        """Change `shares` by what the step told; a fixed mixer has nothing to change."""

    def weights(self) -> Vector:
        """The distribution for the next step, (K,) float64."""
        self.shares.flags.writeable = False
        return self.shares

    def known(self, step: int) -> Vector | None:
        """The distribution of `step` if no loss can change it, else None."""
        return None

    def losses(self, stats: Stats) -> tuple[Vector, NDArray[np.bool_]]:
        """Mean training loss of each source in nats a token, and which of them can be used."""
        count = len(self.sources)
        tokens = vector(stats.tokens, count, "tokens", stats.step)
        means = vector(stats.loss_sum, count, "loss_sum", stats.step) / np.maximum(
            tokens, self.ones
        )
        if not math.isfinite(tokens.dot(tokens)):
            means[~np.isfinite(tokens)] = np.nan  # so that the source counts as refused
        return means, self.usable(means, tokens > 0)

    def usable(self, values: Vector, there: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the values that are there are losses; the others are counted and zeroed in place."""
        good = np.abs(values) <= HUGE
        if good.all():
            return there
        self.rejected = self.rejected + (there & ~good)
        values[~good] = 0.0
        return good & there

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain JSON values keyed by source name."""
        return write_state(self)

    def load_state_dict(
        self, state: Mapping[str, Any], *, on_new: str = "error", on_removed: str = "error"
    ) -> None:
        """Go on from `state_dict()`.

        on_new      what a source gets that the state lacks: "prior", its share as at the start, "mean" of the others.
        on_removed  "drop" forgets a source that only the state has.
        Raises      CheckpointError, by default also if the sources differ, naming them.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"the state of mixer {self.kind!r} is damaged: it is {type(state).__name__}"
            )
        if state.get("kind") != self.kind:
            raise CheckpointError(
                f"the state is of mixer {state.get('kind')!r}, this run has {self.kind!r};"
                " keep the settings of the mixer, or start a new run"
            )
        inner_states = state.get("inner", [])
        if len(inner_states) != len(self.inner):
            raise CheckpointError(
                f"the state of mixer {self.kind!r} holds {len(inner_states)} inner mixers,"
                f" this run has {len(self.inner)}"
            )
        for mixer, inner_state in zip(self.inner, inner_states, strict=True):
            mixer.load_state_dict(inner_state, on_new=on_new, on_removed=on_removed)
        if read_state(self, state, on_new=on_new, on_removed=on_removed):
            self.shares = normalise(self.shares)
        self.loaded()

    def loaded(self) -> None:
        """Called when a state has been read; rebuilds what is not part of it."""

    def describe(self) -> dict[str, Any]:
        """The mixer, its settings and what it wraps, for a record."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.settings:
            out["settings"] = self.settings
        return out | ({"inner": [mixer.describe() for mixer in self.inner]} if self.inner else {})

    def notes(self, steps: int) -> list[str]:
        """Sentences that a person should read before a run of so many steps."""
        return [note for mixer in self.inner for note in mixer.notes(steps)]

    def report(self) -> dict[str, float]:
        """Single numbers worth logging, of this mixer and what it wraps."""
        return {name: value for mixer in self.inner for name, value in mixer.report().items()}

    def estimates(self) -> Vector | None:
        """(K,) what it has learned of each source and its shares follow; None for a mixer that learns nothing."""
        return None

    def rejected_losses(self) -> NDArray[np.int64]:
        """(K,) losses that were refused so far, by this mixer and what it wraps; NaN, infinite, or huge."""
        return self.rejected
