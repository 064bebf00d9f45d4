"""`Mixer`, the base of all mixers: turns losses into shares.

A mixer is deterministic: it uses neither random numbers nor data.
"""

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
"""Nats a token above which a loss is refused. A uniform guess among 2**72 tokens has less."""
MIXERS: Registry[type["Mixer"]] = Registry("mixer")
"""All mixers by name."""


class Mixer:
    """Shares of K sources that follow the observed losses.

    Call `observe` once per step, in order, with the same numbers on every rank. `weights()` is the
    distribution for the next step: >= 0, sums to 1, read-only.
    A subclass changes `shares` in `update` and lists its state in `per_source` and `scalars`.
    NaN, infinite and huge losses (above 50 nats) are never used; `rejected` counts them by source.
    """

    kind = "mixer"
    needs: frozenset[str] = frozenset({"train_loss"})
    """Inputs among train_loss, ref_loss, val_loss and step; empty if the shares never change."""
    per_source: tuple[str, ...] = ("shares", "rejected")
    """State attributes of shape (K,) or (K, n)."""
    scalars: tuple[str, ...] = ()
    """State attributes that are single numbers."""
    collects = True
    """Whether it learns during warm-up and between updates; False as in its authors' code."""

    def __init__(
        self, sources: Sequence[str], *, prior: ArrayLike | Mapping[str, float] | None = None
    ) -> None:
        self.sources = check_sources(sources)
        self.prior = read_shares(prior, self.sources)
        self.step = 0
        self.shares = self.prior
        self.rejected = np.zeros(len(self.sources), np.int64)
        # Comparing with a vector costs numpy less than with a number.
        self.ones = np.ones(len(self.sources))
        self.inner: list[Mixer] = []
        self.settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{source} {share:.1%}"
            for source, share in zip(self.sources, self.weights(), strict=True)
        )
        inner = "".join(f", around {mixer!r}" for mixer in self.inner)
        return f"{type(self).__name__}({shares}{inner})"

    def observe(self, stats: Stats) -> None:
        """Learn from one step.

        Raises  TrainingError if a vector has the wrong length or the step is out of order.
        """
        if stats.step < 1:
            raise TrainingError(
                f"mixer {self.kind!r} got the stats of step {stats.step}; steps count from 1"
            )
        if stats.step <= self.step:
            raise TrainingError(
                f"mixer {self.kind!r} already observed step {self.step} and got the stats of step"
                f" {stats.step}; observe each step once, in order"
            )
        self.step = stats.step
        self.update(stats)

    def update(self, stats: Stats) -> None:
        """Change `shares` according to a step's stats; a fixed mixer does nothing."""

    def weights(self) -> Vector:
        """The distribution for the next step, (K,) float64."""
        self.shares.flags.writeable = False
        return self.shares

    def known(self, step: int) -> Vector | None:
        """The distribution of `step` if no later loss can change it, else None."""
        return None

    def losses(self, stats: Stats) -> tuple[Vector, NDArray[np.bool_]]:
        """Mean training loss of each source, (K,) nats a token, and (K,) which are usable.

        A source is usable if it has tokens and its loss is a number up to `HUGE`.
        """
        count = len(self.sources)
        tokens = vector(stats.tokens, count, "tokens", stats.step)
        means = vector(stats.loss_sum, count, "loss_sum", stats.step) / np.maximum(
            tokens, self.ones
        )
        if not math.isfinite(tokens.dot(tokens)):
            # A source with a NaN or infinite token count is refused like a NaN loss.
            means[~np.isfinite(tokens)] = np.nan
        return means, self.usable(means, tokens > 0)

    def usable(self, values: Vector, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the present values are usable losses.

        The others are set to 0 in place and counted in `rejected`.
        """
        good = np.abs(values) <= HUGE
        if good.all():
            return present
        self.rejected = self.rejected + (present & ~good)
        values[~good] = 0.0
        return good & present

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, as plain JSON values keyed by source name."""
        return write_state(self)

    def load_state_dict(
        self, state: Mapping[str, Any], *, on_new: str = "error", on_removed: str = "error"
    ) -> None:
        """Continue from `state_dict()`.

        on_new      value of a source that the state lacks: "prior", its initial share; "mean", the
                    mean of the others; "error".
        on_removed  a source that only the state has: "drop" or "error".
        Raises      CheckpointError for a damaged or foreign state, and by default if the sources
                    differ, naming them.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"the state of mixer {self.kind!r} is damaged: expected a mapping, got"
                f" {type(state).__name__}"
            )
        if state.get("kind") != self.kind:
            raise CheckpointError(
                f"the state belongs to mixer {state.get('kind')!r}, but this run has"
                f" {self.kind!r}; keep the mixer's settings, or start a new run"
            )
        inner_states = state.get("inner", [])
        if len(inner_states) != len(self.inner):
            raise CheckpointError(
                f"the state of mixer {self.kind!r} holds {len(inner_states)} inner mixers, but"
                f" this run has {len(self.inner)}; keep the mixer's settings, or start a new run"
            )
        for mixer, inner_state in zip(self.inner, inner_states, strict=True):
            mixer.load_state_dict(inner_state, on_new=on_new, on_removed=on_removed)
        # Shares of other sources no longer sum to 1.
        if read_state(self, state, on_new=on_new, on_removed=on_removed):
            self.shares = normalise(self.shares)
        self.loaded()

    def loaded(self) -> None:
        """Hook after a state was loaded, to rebuild derived attributes."""

    def describe(self) -> dict[str, Any]:
        """The mixer, its settings and its inner mixers, for a record."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.settings:
            out["settings"] = self.settings
        if self.inner:
            out["inner"] = [mixer.describe() for mixer in self.inner]
        return out

    def notes(self, steps: int) -> list[str]:
        """Warnings about a run of `steps` steps, to show before it starts."""
        return [note for mixer in self.inner for note in mixer.notes(steps)]

    def report(self) -> dict[str, float]:
        """Scalars to log, of this mixer and its inner mixers."""
        out: dict[str, float] = {}
        for mixer in self.inner:
            out |= mixer.report()
        return out

    def estimates(self) -> Vector | None:
        """(K,) learned quantity that the shares follow; None if the mixer learns nothing."""
        return None

    def rejected_losses(self) -> NDArray[np.int64]:
        """(K,) number of NaN, infinite and huge losses refused so far, inner mixers included."""
        return self.rejected
