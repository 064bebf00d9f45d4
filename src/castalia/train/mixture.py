"""Mixing in the loop: a planner chooses the rows of each step, and learns from its losses."""

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castalia.core.errors import ConfigError, TrainingError
from castalia.data import RunRows
from castalia.data.loader import RowLookup
from castalia.data.row_source import RowPlaces
from castalia.data.rows_by_source import RowsBySource
from castalia.mixing import BatchPlan, ExhaustionError, Planner, Stats, read_mixture
from castalia.mixing.config import MixingConfig
from castalia.mixing.record import Replay, header_of
from castalia.runs.config import RunConfig
from castalia.train.totals import StepTotals

MOVES = 3
"""Sources that a line on the screen names at most."""
VISIBLE = 0.05
"""Percentage points by which a share must move to be named."""


class StaticBlend:
    """GPT-NeoX's blend, whose rows are fixed before the run: nothing to plan and nothing to learn.

    It answers what `PlannedMixture` answers, so that the loop does not ask which of them it has.
    """

    plans: "PlannedMixture | None" = None
    """The plans for the loader, which then follows the fixed order."""
    plan: BatchPlan | None = None
    prior: NDArray[np.float64] | None = None
    notes: Sequence[str] = ()
    ended: str | None = None

    def mark(self) -> tuple[int, ...]:
        """No plan to compare."""
        return ()

    def agree(self, marks: Sequence[int]) -> None:
        """Every rank has the same fixed order."""

    def observe(self, totals: StepTotals, *, skipped: bool = False) -> None:
        """Learn nothing."""

    def validated(self, losses: ArrayLike) -> None:
        """Learn nothing."""

    def at_end(self) -> bool:
        """Never: the blend repeats its sources."""
        return False


class PlannedMixture:
    """The planner of a run, as its loop and its loader use it; every rank holds an equal one.

    Iterating gives the plan of the next step, or None while the losses that it depends on are
    missing. Step t, from 1, follows the losses up to step t - 1 - lag. A held-out loss counts as
    observed with the step after its validation. A step without an update teaches nothing.
    """

    def __init__(
        self,
        planner: Planner,
        config: MixingConfig,
        *,
        steps: int,
        notes: Sequence[str] = (),
        allow_changed: bool = False,
    ) -> None:
        self.planner = planner
        self.config = config
        self.steps = steps
        self.allow_changed = allow_changed
        self.repeats: Replay | None = None
        """The replay whose very rows this run reads."""
        self.notes = [*planner.mixer.notes(steps), *notes]
        """Sentences for the start table."""
        self.done = 0
        """Steps observed."""
        self.ended: str | None = None
        """Why no further step can be planned, once the sources are exhausted."""
        self.held_out: NDArray[np.float64] | None = None
        """(K,) held-out losses that the mixer has not observed yet, nats a token."""
        self.plan: BatchPlan | None = None
        self.stats: Stats | None = None
        self.coming: deque[BatchPlan] = deque()
        """Plans that no step has used; the loader has taken the first `taken` of them."""
        self.taken = 0

    @property
    def prior(self) -> NDArray[np.float64]:
        """(K,) shares before any loss was observed."""
        return self.planner.mixer.prior

    @property
    def plans(self) -> "PlannedMixture":
        """The plans for the loader."""
        return self

    def __iter__(self) -> "PlannedMixture":
        return self

    def __next__(self) -> RowLookup | None:
        self.plan_ahead()
        # The loader reads ahead of the loop; both walk through the same queue.
        if self.taken < len(self.coming):
            self.taken += 1
            return located(self.coming[self.taken - 1])
        if self.ended or self.planner.step >= self.steps:
            raise StopIteration
        # Not the end: the loader asks again once the losses of the last step are known.
        return None

    def plan_ahead(self) -> None:
        """Plan every step that the lag allows."""
        last = min(self.done + 1 + self.planner.lag, self.steps)
        while self.ended is None and self.planner.step < last:
            try:
                plan = self.planner.plan(self.planner.step + 1)
                if self.repeats is not None:
                    self.repeats.require_same(plan)
                self.coming.append(plan)
            except ExhaustionError as error:
                # Steps already planned still run; the loop ends after them.
                self.ended = str(error)

    def at_end(self) -> bool:
        """Whether the sources give no further step, so that the run ends after this one."""
        self.plan_ahead()
        return self.ended is not None and not self.coming

    def mark(self) -> tuple[int, int]:
        """A hash of the current step's plan, and its negative.

        The maximum over ranks of both shows whether all are equal: max(h) == -max(-h) == min(h).
        """
        # Starts and counts are the whole plan: rows follow from them and from the seed.
        plan = self.coming[0]
        number = zlib.crc32(plan.starts.tobytes(), zlib.crc32(plan.counts.tobytes()))
        return number, -number

    def agree(self, marks: Sequence[int]) -> None:
        """Compare the largest marks of all ranks.

        Raises  TrainingError, on every rank, if they planned different rows.
        """
        if marks[0] != -marks[1]:
            raise TrainingError(
                f"step {self.done + 1}: the planners disagree across ranks, so they read different"
                " rows; nothing was updated, and the same command resumes from the last checkpoint;"
                " a larger mixing.grain keeps them equal"
            )

    def observe(self, totals: StepTotals, *, skipped: bool = False) -> None:
        """Give the mixer the losses of a step; `skipped` if it made no update."""
        self.done += 1
        self.plan = self.coming.popleft()
        self.taken -= 1
        sums = np.array(totals.per_source, np.float64)[: len(self.planner.sources)]
        if skipped:
            sums = np.zeros_like(sums)
        # Rounded, so that another order of float additions on another world size gives the same
        # shares, and with them the same rows.
        self.stats = Stats(
            self.done, rounded(sums, self.config.grain), sums[:, 1], val_loss=self.held_out
        )
        # Observed once: the mixer must not count one validation at every step.
        self.held_out = None
        self.planner.observe(self.stats)

    def validated(self, losses: ArrayLike) -> None:
        """Held-out losses by source, nats a token; NaN for a source without rows."""
        grain = self.config.grain
        values = np.array(losses, np.float64)
        # As for training losses: rounding hides the order of the additions.
        if grain:
            values = np.rint(values / grain) * grain
        self.held_out = values

    def state_dict(self) -> dict[str, Any]:
        """The state for a resume, as JSON values keyed by source name."""
        held_out = None
        if self.held_out is not None:
            held_out = dict(zip(self.planner.sources, self.held_out.tolist(), strict=True))
        return {"planner": self.planner.state_dict(self.done), "held_out": held_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with the config's policies for new and removed sources.

        Raises  CheckpointError if the state does not fit this run.
        """
        self.planner.load_state_dict(
            state["planner"],
            on_new=self.config.on_new,
            on_removed=self.config.on_removed,
            allow_changed=self.allow_changed,
        )
        # Plans made ahead belong to the steps after the checkpoint and are planned again.
        self.done = self.planner.step
        self.ended = None
        self.taken = 0
        self.coming.clear()
        # By name: sources may have been added, removed or reordered since.
        saved = state["held_out"]
        self.held_out = None
        if saved is not None:
            values = [saved.get(name, np.nan) for name in self.planner.sources]
            self.held_out = np.array(values, np.float64)


def located(plan: BatchPlan) -> RowLookup:
    """A plan in the form that the loader reads."""

    # A closure, because a rank resolves only its own rows, and only when it reads them.
    def rows(begin: int, end: int) -> RowPlaces:
        chosen = plan.rows(begin, end)
        return RowPlaces(chosen.source, chosen.index)

    return rows


def rounded(sums: NDArray[np.float64], grain: float) -> NDArray[np.float64]:
    """Loss sums whose means are multiples of `grain`: (K, 2) sums and weights -> (K,)."""
    loss: NDArray[np.float64]
    tokens: NDArray[np.float64]
    loss, tokens = sums.T
    if not grain:
        return loss.copy()
    # A NaN loss passes through; the mixer counts and refuses it.
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = np.rint(loss / np.maximum(tokens, 1) / grain) * grain
    return means * tokens


def make_mixture(config: RunConfig, rows: RunRows) -> PlannedMixture | StaticBlend:
    """The planner of config.mixing, or GPT-NeoX's blend.

    Raises  ConfigError for an unknown source, or for missing losses or steps.
    """
    # build_rows has chosen already: rows by source exist only for a planner.
    if not isinstance(rows.train, RowsBySource):
        return StaticBlend()
    mixing = config.mixing
    # build_rows refuses a source without rows, unless its weight is 0 or mixing.allow_empty is set.
    allow_empty = mixing.allow_empty or bool((rows.train.sizes == 0).any())
    mixer = mixing.make(
        rows.sources,
        tokens=float(config.train.steps * config.tokens_per_step),
        sizes=rows.train.sizes * config.data.seq_length,
        prior=rows.weights,
        allow_empty=allow_empty,
    )
    # By position: the held-out loss of a source steers the share of that source.
    if "val_loss" in mixer.needs and len(rows.valid_sources) != len(rows.sources):
        raise ConfigError(
            f"mixing.kind {mixing.kind} learns from the held-out loss of each source: data.valid"
            f" needs {len(rows.sources)} prefixes, in the order of data.train, got"
            f" {len(rows.valid_sources)}"
        )
    planner = Planner(
        mixer,
        sizes=rows.train.sizes,
        rows=config.train.batch_size,
        seed=config.order_seed,
        lag=mixing.lag,
        exhaustion=mixing.exhaustion,
        allow_empty=allow_empty,
    )
    notes = replay_notes(mixing, planner, config.train.steps)
    mixture = PlannedMixture(
        planner,
        mixing,
        steps=config.train.steps,
        notes=notes,
        allow_changed=config.data.allow_changed,
    )
    if isinstance(mixer, Replay) and not notes:
        mixture.repeats = mixer
    return mixture


def replay_notes(mixing: MixingConfig, planner: Planner, steps: int) -> list[str]:
    """How a replay differs from the recorded run; then the weights repeat, but not the rows.

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
    # These four, with the weights, determine which rows a plan reads.
    names = ("seed", "rows", "sizes", "exhaustion")
    differ = [name for name in names if record.header[name] != header[name]]
    if not differ:
        return []
    return [
        f"replay of {mixing.record}: other {', '.join(differ)} here, so its weights are repeated,"
        " but not its rows"
    ]


def movements(before: NDArray[np.float64], now: NDArray[np.float64], names: Sequence[str]) -> str:
    """The shares that moved most, largest first: `code 31.0% (+4.1) web 22.3% (-3.0)`.

    `steady` if none moved by a visible amount.
    """
    # Percentage points and not ratios: 0.1% that doubles is no news.
    change = 100 * (now - before)
    largest = np.argsort(-np.abs(change), kind="stable")[:MOVES]
    moved = [i for i in largest if abs(change[i]) >= VISIBLE]
    return " ".join(f"{names[i]} {now[i]:.1%} ({change[i]:+.1f})" for i in moved) or "steady"
