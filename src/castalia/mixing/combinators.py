"""Mixers that wrap other mixers: warm-up, floor, cap, smoothing and more."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import Mixer
from castalia.mixing.simplex import Vector, cap, read_shares, read_sizes, towards
from castalia.mixing.stats import Stats, vector


class Around(Mixer):
    """Base: passes the stats to the `inner` mixer and reshapes its shares."""

    def __init__(self, inner: Mixer) -> None:
        super().__init__(inner.sources, prior=inner.prior)
        self.inner = [inner]
        self.needs = inner.needs
        self.collects = inner.collects
        self.reset()

    def reset(self) -> None:
        """Compute the shares before the first step."""
        self.shares = self.shape(self.inner[0].weights())

    def update(self, stats: Stats) -> None:
        """Update the inner mixer first, then the shares."""
        self.inner[0].observe(stats)
        self.shares = self.shape(self.inner[0].weights())

    def shape(self, shares: Vector) -> Vector:
        """Transform the inner mixer's shares (K,)."""
        return shares

    def rejected_losses(self) -> NDArray[np.int64]:
        """Refused losses of this mixer and the inner ones."""
        return sum((mixer.rejected_losses() for mixer in self.inner), self.rejected)

    def estimates(self) -> Vector | None:
        """The inner mixer's estimates."""
        return self.inner[0].estimates()

    def known(self, step: int) -> Vector | None:
        """The reshaped shares of a step, where the inner mixer knows them in advance."""
        shares = self.inner[0].known(step)
        return None if shares is None else self.shape(shares)


class Timed(Around):
    """Base of wrappers whose shares depend on more than the inner mixer's current shares."""

    def __init__(self, inner: Mixer) -> None:
        super().__init__(inner)
        self.needs = inner.needs | {"step"}

    def known(self, step: int) -> Vector | None:
        """None: the shares depend on all earlier steps."""
        return None


class Warmup(Timed):
    """The prior for the first `steps` steps, then the inner mixer.

    A planner with a lag holds the prior for `lag` more steps, because these follow losses of the
    warm-up.

    collect  whether the inner mixer observes during warm-up; the authors of ODM do not.
    factor   largest factor by which a share changes in one step after warm-up, the first included.
             All shares then move the same fraction of their way.
    """

    kind = "warm-up"

    def __init__(
        self,
        inner: Mixer,
        *,
        steps: int,
        prior: ArrayLike | Mapping[str, float] | None = None,
        collect: bool | None = None,
        factor: float | None = None,
    ) -> None:
        if steps < 0:
            raise ConfigError(f"warmup_steps: expected >= 0, got {steps}")
        self.steps = steps
        self.factor = factor
        self.collect = inner.collects if collect is None else collect
        self.start = inner.prior
        if prior is not None:
            self.start = read_shares(prior, inner.sources)
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Update the inner mixer if it may learn now, then the shares."""
        if self.collect or stats.step > self.steps:
            self.inner[0].observe(stats)
        shares = self.shape(self.inner[0].weights())
        if self.factor is not None:
            shares = towards(self.shares, shares, self.factor)
        self.shares = shares

    def shape(self, shares: Vector) -> Vector:
        """The prior until warm-up ends."""
        return self.start if self.step < self.steps else shares

    def known(self, step: int) -> Vector | None:
        """The prior during warm-up, then the shares that the inner mixer knows."""
        if step <= self.steps:
            return self.start
        return self.inner[0].known(step)


class Floor(Around):
    """w <- (1 - c) w + c / K.

    total  c, the mass of all floors together, so that one value suits any K.
    """

    kind = "floor"

    def __init__(self, inner: Mixer, *, total: float) -> None:
        if not 0 <= total <= 1:
            raise ConfigError(
                f"floor: expected between 0 and 1, the mass of all floors together, got {total}"
            )
        self.total = total
        super().__init__(inner)

    def shape(self, shares: Vector) -> Vector:
        """Lift every share."""
        return (1 - self.total) * shares + self.total / len(shares)


class Clip(Around):
    """Caps every share at `most`; the excess goes to the other sources in proportion."""

    kind = "clip"

    def __init__(self, inner: Mixer, *, most: float) -> None:
        if not 1 / len(inner.sources) <= most <= 1:
            least = 1 / len(inner.sources)
            raise ConfigError(
                f"max_share: expected between 1/K = {least:.4g} for {len(inner.sources)} sources"
                f" and 1, got {most}"
            )
        self.most = most
        super().__init__(inner)

    def report(self) -> dict[str, float]:
        """The number of sources at the cap."""
        return super().report() | {"at_max_share": int((self.shares >= self.most - 1e-12).sum())}

    def shape(self, shares: Vector) -> Vector:
        """Cap every share."""
        return cap(shares, self.most)


class EpochCap(Timed):
    """Reads no source more than `max_epochs` times in a run: UniMax's rule for moving shares.

    A source of n tokens, s of which were read, may have at most the share
    (max_epochs n - s) / (horizon - tokens read of all sources). sizes and horizon are in tokens.
    If all caps together are less than the run still needs, `binds` is true, the caps are scaled up
    in proportion, and sources are read more often than `max_epochs`.
    """

    kind = "epoch-cap"
    per_source = ("shares", "rejected", "read")

    def __init__(
        self,
        inner: Mixer,
        *,
        sizes: ArrayLike | Mapping[str, float],
        max_epochs: float,
        horizon: float,
    ) -> None:
        if not (max_epochs > 0 and horizon > 0):
            raise ConfigError(
                "epoch cap: expected max_epochs > 0 and horizon > 0,"
                f" got {max_epochs} and {horizon}"
            )
        self.sizes = read_sizes(sizes, inner.sources)
        self.max_epochs = max_epochs
        self.horizon = horizon
        self.read = np.zeros(len(inner.sources))
        self.binds = False
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Count the tokens read, then cap."""
        tokens = vector(stats.tokens, len(self.sources), "tokens", stats.step)
        self.read = self.read + np.where(np.isfinite(tokens), tokens, 0.0)
        super().update(stats)

    def report(self) -> dict[str, float]:
        """1 if the run needs more tokens than the caps allow, else 0."""
        return super().report() | {"epoch_cap_overstepped": int(self.binds)}

    def shape(self, shares: Vector) -> Vector:
        """Cap each share at what its source has left."""
        left = np.maximum(self.max_epochs * self.sizes - self.read, 0.0)
        to_come = max(self.horizon - float(self.read.sum()), 1.0)
        # The tolerance keeps a budget of exactly max_epochs passes from being reported.
        self.binds = bool(left.sum() < to_come * (1 - 1e-9))
        return cap(shares, left / to_come)


class Smooth(Timed):
    """w <- b w + (1 - b) inner at every step, so that shares move slowly."""

    kind = "smooth"

    def __init__(self, inner: Mixer, *, past: float) -> None:
        if not 0 <= past < 1:
            raise ConfigError(f"weight_smoothing: expected in [0, 1), got {past}")
        self.past = past
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Move towards the inner mixer's shares."""
        self.inner[0].observe(stats)
        self.shares = self.past * self.shares + (1 - self.past) * self.inner[0].weights()


class Average(Timed):
    """The mean of the inner mixer's shares over all steps so far; the output of DoReMi.

    Source  Xie et al. 2023, arXiv:2305.10429, algorithm 1.
    """

    kind = "average"
    scalars = ("averaged",)

    def __init__(self, inner: Mixer) -> None:
        # The shares before the first step count as one observation.
        self.averaged = 1
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Add the inner mixer's shares for the next step to the mean."""
        self.inner[0].observe(stats)
        self.averaged += 1
        self.shares = self.shares + (self.inner[0].weights() - self.shares) / self.averaged


class Freeze(Timed):
    """The inner mixer up to step `after`; then it observes no more and the shares stay fixed."""

    kind = "freeze"

    def __init__(self, inner: Mixer, *, after: int) -> None:
        if after < 0:
            raise ConfigError(f"freeze_after: expected a step >= 0, got {after}")
        self.after = after
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Pass the stats on up to step `after`."""
        if stats.step <= self.after:
            super().update(stats)


class Every(Timed):
    """The inner mixer observes once in `steps` steps, with the sums of all steps in between.

    collect  False passes on the stats of the due step alone, as ODM's code does.
    """

    kind = "every"
    per_source = ("shares", "rejected", "loss_sum", "tokens", "ref_loss_sum", "excess_sum")
    scalars = ("has_ref", "has_excess")

    def __init__(self, inner: Mixer, *, steps: int, collect: bool | None = None) -> None:
        if steps < 1:
            raise ConfigError(f"update_every: expected >= 1 steps, got {steps}")
        self.steps = steps
        self.collect = inner.collects if collect is None else collect
        self.sources = inner.sources
        self.clear()
        super().__init__(inner)

    def clear(self) -> None:
        """Reset the sums."""
        count = len(self.sources)
        self.loss_sum = np.zeros(count)
        self.tokens = np.zeros(count)
        self.ref_loss_sum = np.zeros(count)
        self.excess_sum = np.zeros(count)
        self.has_ref = False
        self.has_excess = False

    def update(self, stats: Stats) -> None:
        """Add the stats to the sums, and pass these on when due.

        An evaluation is always passed on at once: a held-out loss cannot be summed.
        """
        due = stats.step % self.steps == 0 or stats.val_loss is not None
        if not self.collect:
            if due:
                super().update(stats)
            return

        self.add(stats)
        if not due:
            return
        ref = self.ref_loss_sum if self.has_ref else None
        excess = self.excess_sum if self.has_excess else None
        super().update(Stats(stats.step, self.loss_sum, self.tokens, stats.val_loss, ref, excess))
        self.clear()

    def add(self, stats: Stats) -> None:
        """Add a step to the sums, without refused losses."""
        means, usable = self.losses(stats)
        tokens = np.where(usable, np.asarray(stats.tokens, np.float64), 0.0)
        self.loss_sum = self.loss_sum + means * tokens
        self.tokens = self.tokens + tokens
        if stats.ref_loss_sum is not None:
            self.ref_loss_sum = self.ref_loss_sum + np.where(usable, stats.ref_loss_sum, 0.0)
            self.has_ref = True
        if stats.excess_sum is not None:
            self.excess_sum = self.excess_sum + np.where(usable, stats.excess_sum, 0.0)
            self.has_excess = True


class Schedule(Timed):
    """Several mixers in sequence: `[(1, a), (1000, b)]` uses a for steps 1 to 999, then b.

    All of them observe every step.
    """

    kind = "schedule"

    def __init__(self, stages: Sequence[tuple[int, Mixer]]) -> None:
        starts = [start for start, _ in stages]
        if not stages or starts[0] != 1 or sorted(set(starts)) != starts:
            raise ConfigError(f"schedule: expected increasing steps starting at 1, got {starts}")
        self.starts = starts
        mixers = [mixer for _, mixer in stages]
        if any(mixer.sources != mixers[0].sources for mixer in mixers):
            raise ConfigError("schedule: all mixers must have the same sources in the same order")
        super().__init__(mixers[0])
        self.inner = mixers
        self.needs = frozenset({"step"}).union(*(mixer.needs for mixer in mixers))

    def update(self, stats: Stats) -> None:
        """Let every stage observe, so that later ones are ready, then take the current shares."""
        for mixer in self.inner:
            mixer.observe(stats)
        self.shares = self.inner[self.place(stats.step + 1)].weights()

    def estimates(self) -> Vector | None:
        """The current stage's estimates."""
        return self.inner[self.place(self.step + 1)].estimates()

    def place(self, step: int) -> int:
        """Index of the stage of a step."""
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def known(self, step: int) -> Vector | None:
        """The shares of a step, where its stage knows them in advance."""
        return self.inner[self.place(step)].known(step)


class Within(Around):
    """A mixer of a subset of the sources; the others have weight 0 and enter no formula."""

    kind = "within"

    def __init__(self, inner: Mixer, sources: Sequence[str]) -> None:
        missing = [name for name in inner.sources if name not in sources]
        if missing:
            raise ConfigError(
                f"source {missing[0]!r} of the inner mixer is not among {', '.join(sources[:20])}"
            )
        places = {name: i for i, name in enumerate(sources)}
        self.places = np.array([places[name] for name in inner.sources])
        # Not Around's: that one takes the sources of the inner mixer.
        Mixer.__init__(self, sources)
        self.inner = [inner]
        self.needs = inner.needs
        self.collects = inner.collects
        self.prior = self.shape(inner.prior)
        self.reset()

    def load_state_dict(
        self, state: Mapping[str, Any], *, on_new: str = "error", on_removed: str = "error"
    ) -> None:
        """Continue from a state of the same sources, or from one in which no source had weight 0.

        The latter is a state of the inner mixer; it loses the sources that have weight 0 now.
        """
        inner = self.inner[0]
        if isinstance(state, Mapping) and state.get("kind") == inner.kind:
            inner.load_state_dict(state, on_new=on_new, on_removed="drop")
            self.step = inner.step
            self.reset()
            return
        super().load_state_dict(state, on_new=on_new, on_removed=on_removed)

    def update(self, stats: Stats) -> None:
        """Pass on the numbers of the inner mixer's sources."""
        picked: dict[str, Vector] = {}
        for name in ("loss_sum", "tokens", "val_loss", "ref_loss_sum", "excess_sum"):
            values = getattr(stats, name)
            if values is not None:
                every = vector(values, len(self.sources), name, stats.step)
                picked[name] = every[self.places]
        super().update(Stats(stats.step, **picked))

    def estimates(self) -> Vector | None:
        """The inner mixer's estimates at the places of its sources, NaN elsewhere."""
        inner_estimates = self.inner[0].estimates()
        if inner_estimates is None:
            return None
        out = np.full(len(self.sources), np.nan)
        out[self.places] = inner_estimates
        return out

    def rejected_losses(self) -> NDArray[np.int64]:
        """The inner mixer's refused losses at the places of its sources."""
        out = self.rejected.copy()
        out[self.places] += self.inner[0].rejected_losses()
        return out

    def shape(self, shares: Vector) -> Vector:
        """The inner mixer's shares at the places of its sources, 0 elsewhere."""
        out = np.zeros(len(self.sources))
        out[self.places] = shares
        return out
