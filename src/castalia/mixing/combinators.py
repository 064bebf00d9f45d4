"""Mixers around mixers: warm-up, floor, cap, smoothing, and the like. Each holds `inner` and hands it the stats."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError
from castalia.mixing.mixer import Mixer
from castalia.mixing.simplex import Vector, cap, read_shares, read_sizes, towards
from castalia.mixing.stats import Stats, vector


class Around(Mixer):
    """Base: passes the stats on and shapes what comes back."""

    def __init__(self, inner: Mixer) -> None:
        super().__init__(inner.sources, prior=inner.prior)
        self.inner = [inner]
        self.needs = inner.needs
        self.collects = inner.collects
        self.scratch()

    def scratch(self) -> None:
        """The shares before the first step; again when sizes and limits are known."""
        self.shares = self.shape(self.inner[0].weights())

    def update(self, stats: Stats) -> None:
        """Inner first."""
        self.inner[0].observe(stats)
        self.shares = self.shape(self.inner[0].weights())

    def shape(self, shares: Vector) -> Vector:
        """What becomes of the inner mixer's shares."""
        return shares

    def rejected_losses(self) -> NDArray[np.int64]:
        """Its own and those of what it wraps."""
        return sum((mixer.rejected_losses() for mixer in self.inner), self.rejected)

    def estimates(self) -> Vector | None:
        """Those of the mixer that it wraps."""
        return self.inner[0].estimates()

    def known(self, step: int) -> Vector | None:
        """The shape of what the inner mixer knows."""
        shares = self.inner[0].known(step)
        return None if shares is None else self.shape(shares)


class Timed(Around):
    """Base of those whose shares depend on more than the inner mixer's present ones."""

    def __init__(self, inner: Mixer) -> None:
        super().__init__(inner)
        self.needs = inner.needs | {"step"}

    def known(self, step: int) -> Vector | None:
        """Not without the stats of the steps before."""
        return None


class Warmup(Timed):
    """The prior for the first `steps` steps, then the inner mixer.

    With `collect` the inner mixer observes during warm-up; the authors of ODM do not. With `factor` no share grows or
    shrinks by more than that in a step after warm-up, the first included: all go the same part of their way. A planner
    with a lag holds the prior for as many steps more, since these follow losses of the warm-up.
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
        self.factor = factor
        self.steps, self.collect = steps, inner.collects if collect is None else collect
        self.start = inner.prior if prior is None else read_shares(prior, inner.sources)
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Inner first, where it may learn."""
        if self.collect or stats.step > self.steps:
            self.inner[0].observe(stats)
        shares = self.shape(self.inner[0].weights())
        self.shares = shares if self.factor is None else towards(self.shares, shares, self.factor)

    def shape(self, shares: Vector) -> Vector:
        """The prior up to the end of warm-up."""
        return self.start if self.step < self.steps else shares

    def known(self, step: int) -> Vector | None:
        """The prior in warm-up, then what the inner mixer knows."""
        return self.start if step <= self.steps else self.inner[0].known(step)


class Floor(Around):
    """w <- (1 - c) w + c / K. `total` is c, the mass of all floors together, so one value suits any K."""

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
    """No share above `most`; what is over goes to the others in proportion."""

    kind = "clip"

    def __init__(self, inner: Mixer, *, most: float) -> None:
        if not 1 / len(inner.sources) <= most <= 1:
            least = 1 / len(inner.sources)
            raise ConfigError(
                f"max_share: expected between 1/K = {least:.4g} for {len(inner.sources)} sources and 1, got {most}"
            )
        self.most = most
        super().__init__(inner)

    def report(self) -> dict[str, float]:
        """Sources that stand at the cap."""
        return super().report() | {"at_max_share": int((self.shares >= self.most - 1e-12).sum())}

    def shape(self, shares: Vector) -> Vector:
        """Cap every share."""
        return cap(shares, self.most)


class EpochCap(Timed):
    """No source read more than `max_epochs` times by the end of the run: UniMax's rule, kept up while shares move.

    A source with s of its n tokens' worth of reading behind it may have at most (max_epochs n - s) / (horizon - all
    tokens so far). sizes and horizon in tokens. Where all caps together are less than the run still takes, `binds` is
    true, all are kept in proportion, and the cap is overstepped.
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
                f"epoch cap: expected max_epochs > 0 and horizon > 0, got {max_epochs} and {horizon}"
            )
        self.sizes, self.max_epochs, self.horizon = (
            read_sizes(sizes, inner.sources),
            max_epochs,
            horizon,
        )
        self.read, self.binds = np.zeros(len(inner.sources)), False
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Count what was read, then cap."""
        tokens = vector(stats.tokens, len(self.sources), "tokens", stats.step)
        self.read = self.read + np.where(np.isfinite(tokens), tokens, 0.0)
        super().update(stats)

    def report(self) -> dict[str, float]:
        """Whether the run takes more than all the caps allow."""
        return super().report() | {"epoch_cap_overstepped": int(self.binds)}

    def shape(self, shares: Vector) -> Vector:
        """Hold every share below what its source has left."""
        left = np.maximum(self.max_epochs * self.sizes - self.read, 0.0)
        to_come = max(self.horizon - float(self.read.sum()), 1.0)
        self.binds = bool(left.sum() < to_come * (1 - 1e-9))
        return cap(shares, left / to_come)


class Smooth(Timed):
    """w <- b w + (1 - b) inner, step by step: shares move slowly."""

    kind = "smooth"

    def __init__(self, inner: Mixer, *, past: float) -> None:
        if not 0 <= past < 1:
            raise ConfigError(f"weight_smoothing: expected in [0, 1), got {past}")
        self.past = past
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """A step towards the inner mixer's shares."""
        self.inner[0].observe(stats)
        self.shares = self.past * self.shares + (1 - self.past) * self.inner[0].weights()


class Average(Timed):
    """The mean of the inner mixer's shares over the steps so far, its first included: what DoReMi exports."""

    kind = "average"
    scalars = ("averaged",)

    def __init__(self, inner: Mixer) -> None:
        self.averaged = 1
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Take in the inner mixer's shares for the next step."""
        self.inner[0].observe(stats)
        self.averaged += 1
        self.shares = self.shares + (self.inner[0].weights() - self.shares) / self.averaged


class Freeze(Timed):
    """The inner mixer up to step `after`; from then on the shares stand and it observes no more."""

    kind = "freeze"

    def __init__(self, inner: Mixer, *, after: int) -> None:
        if after < 0:
            raise ConfigError(f"freeze_after: expected a step >= 0, got {after}")
        self.after = after
        super().__init__(inner)

    def update(self, stats: Stats) -> None:
        """Pass on what comes up to the last step that counts."""
        if stats.step <= self.after:
            super().update(stats)


class Every(Timed):
    """The inner mixer observes once in `steps` steps, the sums of all steps since; nothing in between is lost.

    Without `collect` it observes the stats of the due step alone, as ODM's code does.
    """

    kind = "every"
    per_source = ("shares", "rejected", "loss_sum", "tokens", "ref_loss_sum", "excess_sum")
    scalars = ("has_ref", "has_excess")

    def __init__(self, inner: Mixer, *, steps: int, collect: bool | None = None) -> None:
        if steps < 1:
            raise ConfigError(f"update_every: expected >= 1 steps, got {steps}")
        self.steps, self.collect = steps, inner.collects if collect is None else collect
        self.sources = inner.sources
        self.clear()
        super().__init__(inner)

    def clear(self) -> None:
        """Forget the sums."""
        self.loss_sum, self.tokens, self.ref_loss_sum, self.excess_sum = np.zeros(
            (4, len(self.sources))
        )
        self.has_ref = self.has_excess = False

    def update(self, stats: Stats) -> None:
        """Add up; pass the sums on when they are due or an evaluation came."""
        due = stats.step % self.steps == 0 or stats.val_loss is not None
        if not self.collect:
            if due:
                super().update(stats)
            return
        means, seen = self.losses(stats)
        tokens = np.where(seen, np.asarray(stats.tokens, np.float64), 0.0)
        self.loss_sum, self.tokens = self.loss_sum + means * tokens, self.tokens + tokens
        if stats.ref_loss_sum is not None:
            self.ref_loss_sum, self.has_ref = (
                self.ref_loss_sum + np.where(seen, stats.ref_loss_sum, 0.0),
                True,
            )
        if stats.excess_sum is not None:
            self.excess_sum, self.has_excess = (
                self.excess_sum + np.where(seen, stats.excess_sum, 0.0),
                True,
            )
        if due:
            ref, excess = (
                self.ref_loss_sum if self.has_ref else None,
                self.excess_sum if self.has_excess else None,
            )
            super().update(
                Stats(stats.step, self.loss_sum, self.tokens, stats.val_loss, ref, excess)
            )
            self.clear()


class Schedule(Timed):
    """Several mixers one after another: `[(1, a), (1000, b)]` takes a for steps 1 to 999, then b. All observe."""

    kind = "schedule"

    def __init__(self, stages: Sequence[tuple[int, Mixer]]) -> None:
        starts = [start for start, _ in stages]
        if not stages or starts[0] != 1 or sorted(set(starts)) != starts:
            raise ConfigError(f"schedule: expected growing steps that begin with 1, got {starts}")
        self.starts, mixers = starts, [mixer for _, mixer in stages]
        if any(mixer.sources != mixers[0].sources for mixer in mixers):
            raise ConfigError(
                "schedule: all its mixers must have the same sources in the same order"
            )
        super().__init__(mixers[0])
        self.inner = mixers
        self.needs = frozenset({"step"}).union(*(mixer.needs for mixer in mixers))

    def update(self, stats: Stats) -> None:
        """Every stage observes, so that a later one is ready."""
        for mixer in self.inner:
            mixer.observe(stats)
        self.shares = self.inner[self.place(stats.step + 1)].weights()

    def estimates(self) -> Vector | None:
        """Those of the stage that holds now."""
        return self.inner[self.place(self.step + 1)].estimates()

    def place(self, step: int) -> int:
        """The stage of a step."""
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def known(self, step: int) -> Vector | None:
        """What the stage of that step knows."""
        return self.inner[self.place(step)].known(step)


class Within(Around):
    """A mixer of some sources among more: the others have weight 0 and count nowhere."""

    kind = "within"

    def __init__(self, inner: Mixer, sources: Sequence[str]) -> None:
        missing = [name for name in inner.sources if name not in sources]
        if missing:
            raise ConfigError(
                f"source {missing[0]!r} of the inner mixer is not among {', '.join(sources[:20])}"
            )
        places = {name: i for i, name in enumerate(sources)}
        self.places = np.array([places[name] for name in inner.sources])
        Mixer.__init__(self, sources)
        self.inner, self.needs, self.collects = [inner], inner.needs, inner.collects
        self.prior = self.shape(inner.prior)
        self.scratch()

    def update(self, stats: Stats) -> None:
        """Hand on the numbers of the inner mixer's sources."""
        count = len(self.sources)
        names = ("loss_sum", "tokens", "val_loss", "ref_loss_sum", "excess_sum")
        given = {name: getattr(stats, name) for name in names}
        picked = {
            name: vector(v, count, name, stats.step)[self.places]
            for name, v in given.items()
            if v is not None
        }
        super().update(Stats(stats.step, **picked))

    def estimates(self) -> Vector | None:
        """Those of the inner mixer, at the places of its sources; NaN for the others."""
        found = self.inner[0].estimates()
        if found is None:
            return None
        out = np.full(len(self.sources), np.nan)
        out[self.places] = found
        return out

    def rejected_losses(self) -> NDArray[np.int64]:
        """Those of the inner mixer, at the places of its sources."""
        out = self.rejected.copy()
        out[self.places] += self.inner[0].rejected_losses()
        return out

    def shape(self, shares: Vector) -> Vector:
        """0 for the others."""
        out = np.zeros(len(self.sources))
        out[self.places] = shares
        return out
