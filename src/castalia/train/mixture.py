"""Mixing in the loop: a planner says which rows each step reads, and the step's losses by source go back to it."""

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import CheckpointError, ConfigError, TrainingError
from castalia.data import RunRows
from castalia.data.loader import RowLookup
from castalia.data.rows_by_source import RowPlaces, RowsBySource
from castalia.mixing import (
    BatchPlan,
    ExhaustionError,
    PlannedRows,
    Planner,
    Stats,
    make_mixer,
    read_mixture,
)
from castalia.mixing.config import MixingConfig
from castalia.mixing.record import header_of
from castalia.train.config import RunConfig
from castalia.train.progress import StepTotals

MOVES, SEEN = 3, 0.05
"""Sources that a line on the screen names at most, and the percentage points from which on it does."""


class Mixture:
    """The planner of a run as its loop and its loader see it; every process holds an equal one.

    Iterating gives the plan of the next step, or None while the losses that it follows are not there yet. Step t, from
    1, follows the losses up to step t - 1 - lag, and a held-out loss counts as observed with the step after its
    validation. A step that made no update tells the mixer nothing.
    """

    def __init__(
        self, planner: Planner, config: MixingConfig, *, steps: int, notes: Sequence[str] = ()
    ) -> None:
        self.planner, self.config, self.steps = planner, config, steps
        self.notes = [*planner.mixer.notes(steps), *notes]
        """What a person should read before the run."""
        self.done = 0
        """Steps observed."""
        self.ended: str | None = None
        """Why no step can be planned any more, where the sources are exhausted."""
        self.held_out: NDArray[np.float64] | None = None
        """(K,) held-out losses that the mixer has not seen yet, nats a token."""
        self.plan: BatchPlan | None = None
        self.stats: Stats | None = None
        self.coming: deque[BatchPlan] = deque()
        """Plans that no step has used yet; the loader has taken the first `taken` of them."""
        self.taken = 0

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> RowLookup | None:
        self.plan_ahead()
        if self.taken < len(self.coming):
            self.taken += 1
            return located(self.coming[self.taken - 1])
        if self.ended or self.planner.step >= self.steps:
            raise StopIteration
        return None

    def plan_ahead(self) -> None:
        """Plan every step of the run that the lag allows."""
        while self.ended is None and self.planner.step < min(
            self.done + 1 + self.planner.lag, self.steps
        ):
            try:
                self.coming.append(self.planner.plan(self.planner.step + 1))
            except ExhaustionError as error:
                self.ended = str(error)

    def at_end(self) -> bool:
        """Whether the sources give no further step; where they do not, the run ends after this one."""
        self.plan_ahead()
        return self.ended is not None and not self.coming

    def mark(self) -> tuple[int, int]:
        """A hash of the plan of the step under way, and its negative: the largest of each tell whether all agree."""
        plan = self.coming[0]
        number = zlib.crc32(plan.starts.tobytes(), zlib.crc32(plan.counts.tobytes()))
        return number, -number

    def agree(self, marks: Sequence[int]) -> None:
        """Compare the largest marks of all processes.

        Raises  TrainingError, on all of them, if they planned different rows.
        """
        if marks[0] != -marks[1]:
            raise TrainingError(
                f"step {self.done + 1}: the processes planned different rows, for their planners have drifted apart;"
                " nothing was updated, and the same command goes on from the last checkpoint; a larger mixing.grain"
                " keeps them together"
            )

    def observe(self, totals: StepTotals, *, skipped: bool = False) -> None:
        """Tell the mixer what a step brought; `skipped` if it made no update."""
        self.done += 1
        self.plan = self.coming.popleft()
        self.taken -= 1
        sums = np.array(totals.per_source, np.float64)[: len(self.planner.sources)]
        sums = np.zeros_like(sums) if skipped else sums
        self.stats = Stats(
            self.done, rounded(sums, self.config.grain), sums[:, 1], val_loss=self.held_out
        )
        self.held_out = None
        self.planner.observe(self.stats)

    def validated(self, losses: ArrayLike) -> None:
        """Held-out losses by source, nats a token, in the order of the sources; NaN where nothing was read."""
        grain = self.config.grain
        values = np.array(losses, np.float64)
        self.held_out = np.rint(values / grain) * grain if grain else values

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as plain JSON values."""
        held_out = (
            None
            if self.held_out is None
            else dict(zip(self.planner.sources, self.held_out.tolist(), strict=True))
        )
        return {"planner": self.planner.state_dict(self.done), "held_out": held_out}

    def load_state_dict(
        self, state: Mapping[str, Any] | None, *, allow_changed: bool = False
    ) -> None:
        """Go on from `state_dict()`, with the config's policies for sources that came or went.

        Raises  CheckpointError if the checkpoint is of a run without a planner, or does not fit this one.
        """
        if state is None:
            raise CheckpointError(
                "the checkpoint is of a run that no planner mixed; choose another output="
            )
        policies = {"on_new": self.config.on_new, "on_removed": self.config.on_removed}
        self.planner.load_state_dict(state["planner"], **policies, allow_changed=allow_changed)
        self.done, self.ended, self.taken = self.planner.step, None, 0
        self.coming.clear()
        saved = state["held_out"]
        self.held_out = None
        if saved is not None:
            self.held_out = np.array(
                [saved.get(name, np.nan) for name in self.planner.sources], np.float64
            )


def located(plan: BatchPlan) -> RowLookup:
    """A plan as the loader asks for it."""

    def rows(begin: int, end: int) -> RowPlaces:
        found = plan.rows(begin, end)
        return RowPlaces(found.source, found.index)

    return rows


def rounded(sums: NDArray[np.float64], grain: float) -> NDArray[np.float64]:
    """Loss sums whose means are multiples of `grain`: (K, 2) sums and tokens -> (K,)."""
    loss, tokens = sums.T
    if not grain:
        return loss.copy()
    with np.errstate(invalid="ignore"):
        return np.rint(loss / np.maximum(tokens, 1) / grain) * grain * tokens


def make_mixture(config: RunConfig, rows: RunRows) -> Mixture | None:
    """The planner that config.mixing asks for; None for GPT-NeoX's blend.

    Raises  ConfigError for a source that is not there, or losses or steps that are missing.
    """
    if not isinstance(rows.train, RowsBySource):
        return None
    mixing, train = config.mixing, config.train
    mixer = mixing.make(
        rows.sources,
        tokens=float(train.steps * config.tokens_per_step),
        sizes=rows.train.sizes * config.data.seq_length,
        prior=rows.weights,
    )
    if "val_loss" in mixer.needs and len(rows.valid_sources) != len(rows.sources):
        raise ConfigError(
            f"mixing.kind {mixing.kind} learns from the held-out loss of each source: data.valid needs"
            f" {len(rows.sources)} prefixes, in the order of data.train, got {len(rows.valid_sources)}"
        )
    planner = Planner(
        mixer,
        sizes=rows.train.sizes,
        rows=train.batch_size,
        seed=config.seed,
        lag=mixing.lag,
        exhaustion=mixing.exhaustion,
        allow_empty=mixing.allow_empty,
    )
    return Mixture(
        planner, mixing, steps=train.steps, notes=replay_notes(mixing, planner, train.steps)
    )


def replay_notes(mixing: MixingConfig, planner: Planner, steps: int) -> list[str]:
    """In what a replay differs from the run that was recorded: where it does, the weights repeat, but not the rows.

    Raises  ConfigError if the record is shorter than the run.
    """
    if mixing.kind != "replay" or mixing.record is None:
        return []
    record = read_mixture(mixing.record)
    last = record.steps[-1]
    if last < steps:
        raise ConfigError(
            f"mixing.record {mixing.record} ends at step {last} of {steps}; set train.steps={last}"
        )
    header = header_of(planner)
    differ = [
        name
        for name in ("seed", "rows", "sizes", "exhaustion")
        if record.header[name] != header[name]
    ]
    if not differ:
        return []
    return [
        f"replay of {mixing.record}: other {', '.join(differ)} here, so its weights are repeated, but not its rows"
    ]


def movements(before: NDArray[np.float64], now: NDArray[np.float64], names: Sequence[str]) -> str:
    """The shares that moved most, largest first: `code 31.0% (+4.1) web 22.3% (-3.0)`; `steady` where none did."""
    change = 100 * (now - before)
    largest = np.argsort(-np.abs(change), kind="stable")[:MOVES]
    return (
        " ".join(
            f"{names[i]} {now[i]:.1%} ({change[i]:+.1f})" for i in largest if abs(change[i]) >= SEEN
        )
        or "steady"
    )


class RecordedOrder:
    """Which row of which source stood at a place of a run's served order, from its mixture.jsonl.

    Places count from 0, `batch_size` a step. Quick for places in order; going back plans anew from the first step.
    """

    def __init__(self, config: RunConfig, rows: RunRows, path: str | Path) -> None:
        assert isinstance(rows.train, RowsBySource)
        self.config, self.sources, self.sizes = config, rows.sources, rows.train.sizes
        self.record = read_mixture(path)
        self.begin()

    def begin(self) -> None:
        """Before the first step."""
        self.step, self.rows = 0, PlannedRows(*(np.empty(0, np.int64) for _ in range(3)))
        mixing = self.config.mixing
        self.planner = Planner(
            make_mixer("replay", sources=self.sources, record=self.record),
            sizes=self.sizes,
            rows=self.config.train.batch_size,
            seed=self.config.seed,
            exhaustion=mixing.exhaustion,
            allow_empty=mixing.allow_empty,
        )

    def __call__(self, index: int) -> tuple[int, int]:
        """The source of the row at place `index`, and its place in that source's order.

        Raises  TrainingError past the end of the record.
        """
        step, place = divmod(int(index), self.config.train.batch_size)
        if step + 1 < self.step:
            self.begin()
        while self.step < step + 1:
            plan = self.planner.plan(self.step + 1)
            self.step += 1
            if self.step == step + 1:
                self.rows = plan.rows()
        return int(self.rows.source[place]), int(self.rows.index[place])
