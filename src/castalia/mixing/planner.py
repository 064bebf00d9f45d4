"""`Planner`: which rows each step reads, as a pure function of the seed and the shares."""

import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import CheckpointError, ConfigError, TrainingError
from castalia.mixing.exhaustion import Limits
from castalia.mixing.mixer import Mixer
from castalia.mixing.permutation import (
    GOLDEN,
    ONE,
    Keys,
    Places,
    mix,
    mix_all,
    permute,
    quantise,
    resample,
    source_keys,
)
from castalia.mixing.simplex import Vector, read_sizes
from castalia.mixing.states import compare
from castalia.mixing.stats import Stats

SLOTS, OFFSET = 0x51075, 0x0FF5E7
"""Tell the two uses of a step's key apart."""
MOST_ROWS, MOST_SIZE = 1 << 29, 1 << 53


@dataclass(frozen=True)
class PlannedRows:
    """Rows to read, in the order of the batch: three (n,) int64 vectors."""

    source: Places
    """Place of the source in the planner's `sources`."""
    index: Places
    """Row within the source, from 0 to its size less one."""
    epoch: Places
    """How many times the source was read through before."""


class Plan:
    """The rows of one step, for the whole batch; `rows` resolves any part of it, on any process."""

    def __init__(
        self,
        step: int,
        units: Places,
        counts: Places,
        starts: Places,
        sizes: Places,
        keys: Keys,
        seed: int,
    ) -> None:
        self.step, self.units, self.counts, self.starts = step, units, counts, starts
        self.sizes, self.keys, self.seed = sizes, keys, seed
        self.events: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> Vector:
        """(K,) shares that the step follows, in whole parts of 2**-32."""
        return self.units / ONE

    def rows(self, begin: int = 0, end: int | None = None) -> PlannedRows:
        """Places `begin` to `end` of the batch, by default all; a process asks for its own.

        The batch is shuffled by (seed, step), so every part holds a mixture.
        """
        if begin < 0:
            raise TrainingError(
                f"plan.rows({begin}, {end}): expected places from 0 up to the rows of the batch"
            )
        edges = self.counts.cumsum()
        total = int(edges[-1])
        places = np.arange(begin, total if end is None else min(end, total))
        slots = permute(
            places, np.full(len(places), total), np.full(len(places), self.seed, np.uint64)
        )
        source = np.searchsorted(edges, slots, side="right")
        number = self.starts[source] + slots - (edges[source] - self.counts[source])
        sizes = self.sizes[source]
        epoch, place = np.divmod(number, sizes)
        keys = mix_all(self.keys[source] + epoch.astype(np.uint64) * np.uint64(GOLDEN))
        return PlannedRows(source, permute(place, sizes, keys), epoch)


class Planner:
    """Turns a mixer's weights into rows, step by step, from step 1 on.

    mixer       whose weights are followed.
    sizes       (K,) rows of each source, as a list or by name.
    rows        rows in a step, over all processes.
    seed        of the draws and of the order within a source.
    lag         steps that may be planned ahead: step t follows the losses up to step t - 1 - lag.
    exhaustion  what happens when a source was read through, for all or by name: "repeat" in a new order, "stop" the
                run, "drop" the source, "cap:n" drop it after n epochs.
    allow_empty a source without rows gets none; otherwise it is an error.

    Within a source each epoch has its own permutation, keyed by (seed, name, epoch); only how many rows were read is
    kept. Raises ConfigError for wrong settings.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        sizes: ArrayLike | Mapping[str, float],
        rows: int,
        seed: int,
        lag: int = 0,
        exhaustion: str | Mapping[str, str] = "repeat",
        allow_empty: bool = False,
        keep: int = 64,
    ) -> None:
        self.mixer, self.sources = mixer, mixer.sources
        self.sizes = whole_sizes(sizes, self.sources)
        rows, seed, lag = whole(rows, "rows"), whole(seed, "seed"), whole(lag, "lag")
        if not 0 < rows <= MOST_ROWS or lag < 0:
            raise ConfigError(
                f"planner: expected 0 < rows <= {MOST_ROWS} and lag >= 0, got rows {rows} and lag {lag}"
            )
        if not allow_empty and self.sizes.min() < 1:
            empty = self.sources[int(self.sizes.argmin())]
            raise ConfigError(
                f"source {empty!r} has no rows; take it out, or pass allow_empty=True"
            )
        self.batch, self.seed, self.lag = rows, seed, lag
        self.limits = Limits(self.sources, self.sizes, exhaustion)
        self.keys = source_keys(seed, self.sources)
        self.step = 0
        self.cursors = np.zeros(len(self.sources), np.int64)
        self.made: deque[tuple[int, Places, Places]] = deque(maxlen=lag + 1 + keep)
        self.pending: dict[int, Vector] = {}
        self.await_first(mixer.step)

    def await_first(self, done: int) -> None:
        """The steps that no stats can reach any more follow the weights of now."""
        self.pending = {step: self.mixer.weights() for step in range(done + 1, done + 2 + self.lag)}

    def observe(self, stats: Stats) -> None:
        """Tell the mixer what a step brought, and keep its weights for the step that follows them."""
        self.mixer.observe(stats)
        self.pending[stats.step + 1 + self.lag] = self.mixer.weights()

    def plan(self, step: int) -> Plan:
        """The rows of a step; the steps are planned in order.

        Raises  ExhaustionError where the sources may not give a whole batch any more; TrainingError if the step is
                not the next one or the stats that it follows are missing.
        """
        step = operator.index(step)
        if step != self.step + 1:
            raise TrainingError(
                f"plan({step}): the next step to plan is {self.step + 1}; a resumed run loads the planner's state first"
            )
        units = quantise(self.weights_of(step))
        draw = mix(mix(self.seed + OFFSET) + step * GOLDEN)
        counts, events = resample(units, self.batch, draw), tuple[str, ...]()
        after = self.cursors + counts
        if (after > self.limits.marks).any():
            counts, events = self.limits.fit(units, counts, self.cursors, self.batch, draw)
            after = self.cursors + counts
        slots = mix(mix(self.seed + SLOTS) + step * GOLDEN)
        plan = Plan(step, units, counts, self.cursors, self.sizes, self.keys, slots)
        plan.events = events
        self.made.append((step, units, self.cursors))
        self.cursors, self.step = after, step
        self.pending.pop(step, None)
        return plan

    def weights_of(self, step: int) -> Vector:
        """The weights that a step follows."""
        known = self.mixer.known(step)
        if known is not None:
            return known
        if step in self.pending:
            return self.pending[step]
        if self.mixer.step == step - 1 - self.lag:
            return self.mixer.weights()
        raise TrainingError(
            f"plan({step}) with lag {self.lag} follows the losses up to step {max(step - 1 - self.lag, 0)}, but the"
            f" mixer has observed up to step {self.mixer.step}; call planner.observe(stats) after each step"
        )

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """What a run that goes on after `step` needs, the mixer's state included, as plain JSON values.

        step  the last step that is done; by default the last one observed, or planned where none is observed. Steps
              planned beyond it will be planned again, with the same weights and rows.
        Raises  TrainingError if that step is too far back, or the mixer has observed another.
        """
        done = (self.mixer.step or self.step) if step is None else step
        back = {made: (units, cursors) for made, units, cursors in self.made if made > done}
        if done > self.step or len(back) < self.step - done or self.mixer.step not in (0, done):
            raise TrainingError(
                f"planner.state_dict({done}): planned up to step {self.step}, the mixer has observed step"
                f" {self.mixer.step}, and {len(self.made)} planned steps are kept"
            )
        cursors = back[done + 1][1] if back else self.cursors
        weights = {made: units / ONE for made, (units, _) in back.items()}
        weights |= {late: vector for late, vector in self.pending.items() if late > done}
        return {
            "format": 1,
            "step": done,
            "seed": self.seed,
            "rows": self.batch,
            "lag": self.lag,
            "sources": {
                name: {
                    "size": int(size),
                    "read": int(read),
                    "weights": [float(w[i]) for w in weights.values()],
                }
                for i, (name, size, read) in enumerate(
                    zip(self.sources, self.sizes, cursors, strict=True)
                )
            },
            "weights_of": list(weights),
            "mixer": self.mixer.state_dict(),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        on_new: str = "error",
        on_removed: str = "error",
        allow_changed: bool = False,
    ) -> None:
        """Go on from `state_dict()`; a source that the state lacks has not been read.

        allow_changed  other sizes of known sources are no error: their rows are not those of the run before.
        Raises         CheckpointError if seed, lag, sizes or, without a policy for them, the sources differ.
        """
        rows = state.get("sources") if isinstance(state, Mapping) else None
        if not isinstance(rows, Mapping) or state.get("format") != 1:
            found = (
                f"format {state.get('format')!r}"
                if isinstance(state, Mapping)
                else type(state).__name__
            )
            raise CheckpointError(f"a planner's state of format 1 is expected, got {found}")
        for name, mine in (("seed", self.seed), ("lag", self.lag)):
            if state.get(name) != mine:
                raise CheckpointError(
                    f"the planner's state has {name} {state.get(name)}, this run {mine}; keep the old one"
                )
        kept, new = compare(self.sources, rows, on_new=on_new, on_removed=on_removed)
        try:
            self.check_sizes(rows, kept, allow_changed)
            self.mixer.load_state_dict(state["mixer"], on_new=on_new, on_removed=on_removed)
            self.step = int(state["step"])
            self.cursors = np.zeros(len(self.sources), np.int64)
            self.cursors[kept] = [rows[self.sources[i]]["read"] for i in kept]
            self.made.clear()
            self.limits.forget()
            self.await_first(self.step)
            if not new and len(kept) == len(rows):
                vectors = np.array([rows[name]["weights"] for name in self.sources], np.float64)
                self.pending = {
                    int(step): vectors[:, place] for place, step in enumerate(state["weights_of"])
                }
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the planner's state is damaged: {error!r}") from None

    def check_sizes(self, rows: Mapping[str, Any], kept: list[int], allow_changed: bool) -> None:
        """Raise CheckpointError if a source has other rows than the state says."""
        for i in kept:
            name, size = self.sources[i], int(self.sizes[i])
            if rows[name]["size"] != size and not allow_changed:
                raise CheckpointError(
                    f"source {name!r} has {size} rows, the state was made with {rows[name]['size']};"
                    " bring the old data back, or allow changed data"
                )


def whole(number: Any, what: str) -> int:
    """A whole number as Python's own, which states and keys need.

    Raises  ConfigError.
    """
    try:
        return operator.index(number)
    except TypeError:
        raise ConfigError(f"planner: {what}: expected a whole number, got {number!r}") from None


def whole_sizes(sizes: ArrayLike | Mapping[str, float], sources: Sequence[str]) -> Places:
    """Rows of each source, (K,) int64.

    Raises  ConfigError for one that is not a whole number from 0 to 2**53, which is what a permutation can do.
    """
    found = read_sizes(sizes, sources)
    wrong = np.flatnonzero((found % 1 != 0) | (found > MOST_SIZE))
    if len(wrong):
        name, size = sources[int(wrong[0])], found[wrong[0]]
        raise ConfigError(
            f"sizes: source {name!r} has {size:g} rows; expected a whole number up to 2**53"
        )
    return found.astype(np.int64)
