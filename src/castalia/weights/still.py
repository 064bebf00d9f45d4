"""Between which steps the weights stood still: where the learning rate was 0, and nowhere else."""

import re
from dataclasses import dataclass
from typing import Any

from castalia.checkpoint.load import read_state
from castalia.core.errors import CheckpointError
from castalia.optim.schedule import make_schedule
from castalia.runs.config import RunConfig
from castalia.weights.series import Revision, Series

PYTHIA = re.compile(r"pythia-(?:\d+(?:\.\d+)?[mb])(?!.*v0)", re.IGNORECASE)
"""Names of Pythia's models and of their seeds, all but the first version of the suite."""
PYTHIA_STILL = 1
"""Pythia's rate was 0 in its first update, so its step 1 is its step 0.

Source  GPT-NeoX v1.0, megatron/learning_rates.py: lr * n / warmup with n = 0.
"""
MOST_ASKED = 10_000
"""Updates whose rate is asked; a schedule that is 0 for longer ends at 0, which is seen at both
ends."""


@dataclass(frozen=True)
class Stillness:
    """Which revisions of a model may have equal weights."""

    until: int
    """Last step whose weights are those of step 0."""
    config: RunConfig | None
    """Of the run, whose schedule says more."""
    updates: dict[int, int]
    """Updates behind each step, where a record says so; elsewhere as many as steps."""

    def allows(self, one: Revision, other: Revision) -> bool:
        """Whether two revisions may have equal weights."""
        if one.step is None or other.step is None:
            # `main` is one of the steps, usually the last.
            return True
        first, last = sorted((one.step, other.step))
        if last <= self.until:
            return True
        begin = self.updates.get(first, first)
        end = self.updates.get(last, last)
        return self.rate_is_zero(begin, end)

    def rate_is_zero(self, begin: int, end: int) -> bool:
        """Whether updates number `begin` to `end` - 1 had rate 0; also where there was none, as in
        steps that were skipped."""
        if begin == end:
            return True
        if self.config is None:
            return False
        steps = self.config.train.steps
        rate = make_schedule(self.config.schedule, self.config.optim.lr, steps)
        asked = {begin, end - 1, *range(begin, min(end, begin + MOST_ASKED))}
        return all(rate(number) == 0 for number in asked)


def stillness_of(series: Series, until: int | None, states: dict[int, dict[str, Any]]) -> Stillness:
    """Where the weights of a model stood still.

    Takes   until: as the user says; None for what is known of the name.
            states: of the checkpoints of a run, by step.
    """
    if until is None:
        until = 0
        if PYTHIA.search(series.name):
            until = PYTHIA_STILL
    updates = {step: progress_of(state)["updates"] for step, state in states.items()}
    return Stillness(until, series.config(), updates)


def states_of(series: Series) -> dict[int, dict[str, Any]]:
    """The saved states of a run's checkpoints by step; those that cannot be read are left out."""
    states: dict[int, dict[str, Any]] = {}
    for revision in series.revisions if series.is_run else ():
        try:
            state = read_state(revision.folder)
        except CheckpointError:
            continue  # the check of its files says so
        assert revision.step is not None
        # User code that saves with `Store` keeps a state of its own, without progress.
        if "updates" in (progress_of(state) or {}):
            states[revision.step] = state
    return states


def progress_of(state: dict[str, Any]) -> dict[str, int]:
    """Steps, updates and tokens as a checkpoint recorded them; {} where it did not."""
    progress: dict[str, int] = state.get("progress") or {}
    return progress
