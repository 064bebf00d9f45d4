"""`BatchSizes`: how many rows each step takes, and so where in the order it begins. Needs no torch.

Source  The ramp is Megatron-LM's --rampup-batch-size.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from castalia.core.errors import ConfigError

Ramp = tuple[int, int, int]
"""Rows of the first batch, rows that are added at a time, and rows until the batch is full."""


@dataclass(frozen=True)
class BatchSizes:
    """Rows of each step: `rows`, or with a `ramp` fewer in the first steps.

    `ramp` is (start, increment, length): the first batch has `start` rows, and `increment` rows
    more after each equal part of the first `length` rows of the run, up to `rows`. Steps count
    from 0. The order of the rows stays the same; a step takes the next of them.
    """

    rows: int
    ramp: Ramp | None = None

    @cached_property
    def first_rows(self) -> list[int]:
        """The place at which each step of the ramp begins, and then the first full one."""
        if self.ramp is None:
            return [0]
        start, increment, length = self.ramp
        stages = (self.rows - start) // increment
        sizes = []
        taken = 0
        while taken < length:
            # The stage of the rows taken so far, in integers: a float could round either way.
            size = start + increment * (taken * stages // length)
            sizes.append(size)
            taken += size
        return [0, *accumulate(sizes)]

    def size(self, step: int) -> int:
        """Rows of a step."""
        return self.first(step + 1) - self.first(step)

    def first(self, step: int) -> int:
        """The place of a step's first row, which is the number of rows of all steps before it."""
        firsts = self.first_rows
        if step < len(firsts):
            return firsts[step]
        return firsts[-1] + (step - len(firsts) + 1) * self.rows

    def places(self, step: int) -> range:
        """The places of a step's rows in the order of the run."""
        return range(self.first(step), self.first(step + 1))

    def step_of(self, place: int) -> tuple[int, int]:
        """The step that takes the row at a place, and which of its rows that is."""
        firsts = self.first_rows
        if place < firsts[-1]:
            step = bisect_right(firsts, place) - 1
            return step, place - firsts[step]
        steps, row = divmod(place - firsts[-1], self.rows)
        return len(firsts) - 1 + steps, row

    def distinct(self) -> list[int]:
        """Every size that a step may have."""
        ramped = {self.size(step) for step in range(len(self.first_rows) - 1)}
        return sorted({*ramped, self.rows})


def sizes_of(rows: BatchSizes | int) -> BatchSizes:
    """The sizes of batches that all have as many rows, or those that are given."""
    return BatchSizes(rows) if isinstance(rows, int) else rows


def ramp_problem(rows: int, ramp: Ramp) -> str | None:
    """Why a ramp does not lead to a batch of `rows` rows."""
    start, increment, _ = ramp
    if start >= rows:
        return f"it starts with {start} rows, but train.batch_size is {rows}; start with fewer"
    if (rows - start) % increment:
        return (
            f"steps of {increment} rows do not lead from {start} to train.batch_size {rows}:"
            f" {rows - start} is not divisible by {increment}"
        )
    return None


def require_constant(sizes: BatchSizes, what: str) -> int:
    """The rows of every step, for code that has one batch size.

    Raises  ConfigError if the batch grows.
    """
    if sizes.ramp is not None:
        raise ConfigError(f"{what} needs batches of one size; set train.batch_ramp=null")
    return sizes.rows
