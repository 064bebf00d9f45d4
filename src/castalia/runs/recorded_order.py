"""The served order of a mixed run, planned again from its mixture.jsonl."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from castalia.data import RunRows
from castalia.data.row_source import RowPlaces
from castalia.data.rows_by_source import RowsBySource
from castalia.mixing import PlannedRows, Planner, read_mixture
from castalia.mixing.record import Replay
from castalia.runs.config import RunConfig


class RecordedOrder:
    """Maps a place in a run's served order to its source and row.

    Places count from 0, `batch_size` a step. Ascending places are fast; going back plans again
    from the first step, because a planner only walks forward.
    """

    def __init__(self, config: RunConfig, rows: RunRows, path: str | Path) -> None:
        assert isinstance(rows.train, RowsBySource)
        self.config = config
        self.sources = rows.sources
        self.sizes = rows.train.sizes
        self.record = read_mixture(path)
        self.begin()

    def begin(self) -> None:
        """Return to the place before the first step."""
        # A replay of the record needs neither losses nor the mixer that made it.
        self.step = 0
        self.rows = PlannedRows(*(np.empty(0, np.int64) for _ in range(3)))
        mixing = self.config.mixing
        self.replay = Replay(self.sources, record=self.record)
        self.planner = Planner(
            self.replay,
            sizes=self.sizes,
            rows=self.config.train.batch_size,
            seed=self.config.order_seed,
            exhaustion=mixing.exhaustion,
            # The record names no row of a source without rows.
            allow_empty=True,
        )

    def __call__(self, index: int) -> tuple[int, int]:
        """The source of the row at place `index`, and the row's place in that source's order.

        Raises  TrainingError past the end of the record; DataError if it gives other rows than its
                run read.
        """
        step, place = divmod(int(index), self.config.train.batch_size)
        self.plan(step)
        return int(self.rows.source[place]), int(self.rows.index[place])

    def plan(self, step: int) -> None:
        """Plan the rows of a step, counted from 0.

        Raises  TrainingError past the end of the record.
        """
        if step + 1 < self.step:
            self.begin()
        while self.step < step + 1:
            plan = self.planner.plan(self.step + 1)
            self.replay.require_same(plan)
            self.step += 1
            # Resolving a plan to rows is the expensive part; the steps before need none.
            if self.step == step + 1:
                self.rows = plan.rows()

    def locate_all(self, places: Sequence[int]) -> RowPlaces:
        """The source and row of each of (n,) places.

        Raises  TrainingError past the end of the record.
        """
        steps, within = np.divmod(np.asarray(places, np.int64), self.config.train.batch_size)
        source = np.empty(len(steps), np.int64)
        index = np.empty(len(steps), np.int64)
        # Ascending, since a plan follows from those before it: going back begins at step 0.
        order = np.argsort(steps, kind="stable")
        chosen, firsts = np.unique(steps[order], return_index=True)
        for step, own in zip(chosen.tolist(), np.split(order, firsts[1:]), strict=True):
            self.plan(step)
            source[own] = self.rows.source[within[own]]
            index[own] = self.rows.index[within[own]]
        return RowPlaces(source, index)
