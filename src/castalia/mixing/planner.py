"""`Planner`: the rows of each step, a pure function of seed and shares."""

import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from castalia.core.errors import CheckpointError, ConfigError, TrainingError
from castalia.mixing.exhaustion import RowLimits
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

SLOTS = 0x51075
OFFSET = 0x0FF5E7
"""Salts that keep the two uses of a step's key apart: the shuffle of the batch and its draw."""
MOST_ROWS = 1 << 29
"""Largest batch in rows: `resample` multiplies it by units that sum to about 2**32."""
MOST_SIZE = 1 << 53
"""Largest source in rows, the limit of `permute`."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows to read, in the order of the batch: three (n,) int64 vectors."""

    source: Places
    """Index of the source in the planner's `sources`."""
    index: Places
    """Row within the source, from 0 to size - 1."""
    epoch: Places
    """Complete passes over the source before this row."""


class BatchPlan:
    """The rows of one step for the global batch; `rows` resolves any part of it, on any rank.

    Shapes  units (shares in 2**-32), counts (rows in this step), starts (rows read before) and
            sizes (K,) int64; keys (K,) uint64.
    """

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
        self.step = step
        self.units = units
        self.counts = counts
        self.starts = starts
        self.sizes = sizes
        self.keys = keys
        self.seed = seed
        self.events: tuple[str, ...] = ()
        """Sentences for the log about exhausted sources."""

    @cached_property
    def weights(self) -> Vector:
        """(K,) shares that the step follows, rounded to 2**-32."""
        return self.units / ONE

    def rows(self, begin: int = 0, end: int | None = None) -> PlannedRows:
        """Resolve places `begin` to `end` of the batch, by default all of it.

        Each rank asks for its own places. The batch is shuffled by (seed, step), so that every part
        holds a mixture.

        Raises  TrainingError for a negative place.
        """
        if begin < 0:
            raise TrainingError(
                f"plan.rows({begin}, {end}): expected places from 0 to the number of rows in the"
                " batch"
            )
        edges = self.counts.cumsum()
        total = int(edges[-1])
        if end is None or end > total:
            end = total
        places = np.arange(begin, end)
        shuffle = np.full(len(places), self.seed, np.uint64)
        slots = permute(places, np.full(len(places), total), shuffle)

        # Slots of source i are edges[i-1] up to edges[i]; `number` counts its rows since step 1.
        source = np.searchsorted(edges, slots, side="right")
        number = self.starts[source] + slots - (edges[source] - self.counts[source])
        sizes = self.sizes[source]
        epoch, place = np.divmod(number, sizes)
        # A key per epoch, so that each pass has its own order.
        keys = mix_all(self.keys[source] + epoch.astype(np.uint64) * np.uint64(GOLDEN))
        return PlannedRows(source, permute(place, sizes, keys), epoch)


class Planner:
    """Turns a mixer's weights into rows, one step at a time, starting at step 1.

    Within a source each epoch has its own permutation, keyed by (seed, name, epoch). The only state
    is the number of rows read from each source.

    mixer        the mixer whose weights the planner follows.
    sizes        (K,) rows of each source, as a list or by name.
    rows         rows in a step, over all ranks.
    seed         seed of the draws and of the order within a source.
    lag          steps that may be planned ahead: step t follows the losses up to step t - 1 - lag.
    exhaustion   policy for an exhausted source, for all or by name: "repeat" it in a new order,
                 "stop" the run, "drop" the source, or "cap:n", drop it after n epochs.
    allow_empty  plan no rows for an empty source; otherwise it is an error.
    keep         planned steps, beyond the lag, that `state_dict(step)` can go back to.
    Raises       ConfigError for wrong settings.
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
        self.mixer = mixer
        self.sources = mixer.sources
        self.sizes = integer_sizes(sizes, self.sources)
        rows = integer(rows, "rows")
        seed = integer(seed, "seed")
        lag = integer(lag, "lag")
        if not 0 < rows <= MOST_ROWS or lag < 0:
            raise ConfigError(
                f"planner: expected 0 < rows <= {MOST_ROWS} and lag >= 0, got rows {rows} and lag"
                f" {lag}"
            )
        if not allow_empty and self.sizes.min() < 1:
            empty = self.sources[int(self.sizes.argmin())]
            raise ConfigError(f"source {empty!r} has no rows; remove it, or pass allow_empty=True")
        self.batch = rows
        self.seed = seed
        self.lag = lag
        self.limits = RowLimits(self.sources, self.sizes, exhaustion)
        self.keys = source_keys(seed, self.sources)
        self.step = 0
        self.cursors = np.zeros(len(self.sources), np.int64)
        self.recent: deque[tuple[int, Places, Places]] = deque(maxlen=lag + 1 + keep)
        """The last planned steps with their units and the rows read before them."""
        self.pending: dict[int, Vector] = {}
        """Weights of steps not planned yet."""
        self.await_first(mixer.step)

    def __repr__(self) -> str:
        return f"Planner({self.batch} rows a step, step {self.step} planned, {self.mixer!r})"

    def await_first(self, done: int) -> None:
        """Fix the weights of the steps after `done` that later stats cannot influence."""
        self.pending = {step: self.mixer.weights() for step in range(done + 1, done + 2 + self.lag)}

    def observe(self, stats: Stats) -> None:
        """Pass a step's stats to the mixer and store the weights for the step that uses them."""
        self.mixer.observe(stats)
        self.pending[stats.step + 1 + self.lag] = self.mixer.weights()

    def plan(self, step: int) -> BatchPlan:
        """Plan the rows of a step; steps are planned in order.

        Raises  ExhaustionError if the sources cannot fill the batch; TrainingError if the step is
                out of order, or the stats that it follows are missing.
        """
        step = operator.index(step)
        if step != self.step + 1:
            raise TrainingError(
                f"plan({step}): the next step to plan is {self.step + 1}; to resume, load the"
                " planner's state first"
            )
        units = quantise(self.weights_of(step))
        draw = mix(mix(self.seed + OFFSET) + step * GOLDEN)
        counts = resample(units, self.batch, draw)
        events: tuple[str, ...] = ()
        after = self.cursors + counts
        # A cheap test first: few steps of a run touch a limit.
        if (after > self.limits.marks).any():
            counts, events = self.limits.fit(units, counts, self.cursors, self.batch, draw)
            after = self.cursors + counts
        slots = mix(mix(self.seed + SLOTS) + step * GOLDEN)
        plan = BatchPlan(step, units, counts, self.cursors, self.sizes, self.keys, slots)
        plan.events = events
        self.recent.append((step, units, self.cursors))
        self.cursors = after
        self.step = step
        self.pending.pop(step, None)
        return plan

    def weights_of(self, step: int) -> Vector:
        """The weights that a step follows.

        Raises  TrainingError if the stats of step - 1 - lag were not observed.
        """
        known = self.mixer.known(step)
        if known is not None:
            return known
        if step in self.pending:
            return self.pending[step]
        if self.mixer.step == step - 1 - self.lag:
            return self.mixer.weights()
        raise TrainingError(
            f"plan({step}) with lag {self.lag} follows the losses up to step"
            f" {max(step - 1 - self.lag, 0)}, but the mixer has observed up to step"
            f" {self.mixer.step}; call planner.observe(stats) after each step"
        )

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Everything that a run resumed after `step` needs, the mixer's state included.

        Plain JSON values. Steps planned beyond `step` will be planned again, with the same weights
        and rows.

        step    the last completed step; by default the last one observed, or the last one planned
                if the mixer observed nothing.
        Raises  TrainingError if the step is too far back, or the mixer observed another one.
        """
        done = step
        if done is None:
            done = self.mixer.step or self.step
        ahead = {number: (units, read) for number, units, read in self.recent if number > done}
        if done > self.step or len(ahead) < self.step - done or self.mixer.step not in (0, done):
            raise TrainingError(
                f"planner.state_dict({done}): planned up to step {self.step}, the mixer observed up"
                f" to step {self.mixer.step}, and the last {len(self.recent)} planned steps are"
                " kept; ask for the last observed step"
            )
        cursors = ahead[done + 1][1] if ahead else self.cursors
        # Steps planned ahead keep their weights although the mixer has since moved on.
        weights = {number: units / ONE for number, (units, _) in ahead.items()}
        for number, vector in self.pending.items():
            if number > done:
                weights[number] = vector
        sources: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(self.sources):
            sources[name] = {
                "size": int(self.sizes[i]),
                "read": int(cursors[i]),
                "weights": [float(vector[i]) for vector in weights.values()],
            }
        return {
            "format": 1,
            "step": done,
            "seed": self.seed,
            "rows": self.batch,
            "lag": self.lag,
            "sources": sources,
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
        """Continue from `state_dict()`; a source missing from the state starts unread.

        on_new, on_removed  as in `Mixer.load_state_dict`.
        allow_changed       accept other sizes of known sources; their rows then differ from those
                            of the earlier run.
        Raises              CheckpointError if the state is damaged, or seed, lag, sizes or, by
                            default, the sources differ.
        """
        rows = read_sources(state)
        for name, mine in (("seed", self.seed), ("lag", self.lag)):
            if state.get(name) != mine:
                raise CheckpointError(
                    f"the planner's state has {name} {state.get(name)}, but this run has {mine};"
                    " keep the old value"
                )
        kept, new = compare(self.sources, rows, on_new=on_new, on_removed=on_removed)
        try:
            self.check_sizes(rows, kept, allow_changed)
            self.mixer.load_state_dict(state["mixer"], on_new=on_new, on_removed=on_removed)
            self.step = int(state["step"])
            self.cursors = np.zeros(len(self.sources), np.int64)
            self.cursors[kept] = [rows[self.sources[i]]["read"] for i in kept]
            # A source that lost its rows, such as one whose weight is 0 now, has none left.
            self.cursors[self.sizes == 0] = 0
            emptied = any(rows[self.sources[i]]["size"] and not self.sizes[i] for i in kept)
            self.recent.clear()
            self.limits.forget()
            self.await_first(self.step)
            # With other sources the stored weights do not fit; the mixer's present ones hold.
            if not new and not emptied and len(kept) == len(rows):
                vectors = np.array([rows[name]["weights"] for name in self.sources], np.float64)
                self.pending = {
                    int(step): vectors[:, place] for place, step in enumerate(state["weights_of"])
                }
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the planner's state is damaged: {error!r}") from None

    def check_sizes(self, rows: Mapping[str, Any], kept: list[int], allow_changed: bool) -> None:
        """Raise CheckpointError if the size of a source changed."""
        for i in kept:
            name = self.sources[i]
            size = int(self.sizes[i])
            if rows[name]["size"] != size and not allow_changed:
                raise CheckpointError(
                    f"source {name!r} has {size} rows, but the state was saved with"
                    f" {rows[name]['size']}; restore the old data, or allow changed data"
                )


def read_sources(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a planner's state that is keyed by source.

    Raises  CheckpointError if it is not a planner's state of format 1.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected a planner's state of format 1, got {type(state).__name__}")
    rows = state.get("sources")
    if not isinstance(rows, Mapping) or state.get("format") != 1:
        raise CheckpointError(
            f"expected a planner's state of format 1, got format {state.get('format')!r}"
        )
    return rows


def integer(number: Any, what: str) -> int:
    """An integer of any type as Python's int, which states (JSON) and keys (> 64 bits) need.

    Raises  ConfigError.
    """
    try:
        return operator.index(number)
    except TypeError:
        raise ConfigError(f"planner: {what}: expected an integer, got {number!r}") from None


def integer_sizes(sizes: ArrayLike | Mapping[str, float], sources: Sequence[str]) -> Places:
    """Rows of each source, (K,) int64.

    Raises  ConfigError unless all are integers from 0 to 2**53, the limit of `permute`.
    """
    numbers = read_sizes(sizes, sources)
    wrong = np.flatnonzero((numbers % 1 != 0) | (numbers > MOST_SIZE))
    if len(wrong):
        place = int(wrong[0])
        raise ConfigError(
            f"sizes: source {sources[place]!r} has {numbers[place]:g} rows; expected an integer up"
            " to 2**53"
        )
    return numbers.astype(np.int64)
