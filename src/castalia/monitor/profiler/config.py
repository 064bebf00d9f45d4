"""The `profile:` section of a config."""

import os
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, field_validator, model_validator

from castalia.config.base import Config
from castalia.config.problems import ProblemsError

# torch's recorder writes two lines of its own on stderr at each start, below this level. It reads
# the level once, while torch is imported, and a command reads its config before that.
os.environ.setdefault("KINETO_LOG_LEVEL", "10")


def read_windows(value: Any) -> Any:
    """`10:13`, `[10, 13]`, `10` and lists of these as a list of pairs."""
    if isinstance(value, str):
        return [read_window(word) for word in value.split(",") if word.strip()]
    if value is None:
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        return [(value, value)]
    if isinstance(value, list | tuple):
        # Two numbers are one window; two windows are pairs or texts.
        if len(value) == 2 and all(type(each) is int for each in value):
            return [tuple(value)]
        return [read_window(each) for each in value]
    return value


def read_window(value: Any) -> Any:
    """`10:13` or `10` as a pair; anything else as it is.

    Raises  ValueError for a text of another form.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)(?:\s*:\s*(\d+))?\s*", value)
    if match is None:
        raise ValueError(f"expected steps such as 10:13, got {value!r}")
    first = int(match[1])
    return first, int(match[2] or first)


Windows = Annotated[list[tuple[PositiveInt, PositiveInt]], BeforeValidator(read_windows)]


class ProfileConfig(Config):
    """Steps whose operations are recorded, and what is written of them."""

    steps: Windows = []
    """Steps that are recorded, numbered as in the log, the last one included: `10:13`, `[10, 13]`
    or a list of such windows; [] records none."""
    ranks: list[NonNegativeInt] | None = None
    """Ranks that record; null is all of them."""
    memory: bool = False
    """Record allocations too: on a GPU torch's snapshot, for pytorch.org/memory_viz; on a CPU bytes
    by part of the step."""
    memory_folder: str | None = None
    """Folder of the files about memory; null is `profile` in the run's folder."""
    shapes: bool = False
    """Record the shapes of inputs."""
    stacks: bool = False
    """Record the Python stack of each operation; slow."""
    flops: bool = False
    """Estimate FLOPs of matrix products, for the table; records shapes too."""
    nsys: bool = False
    """In place of a trace, mark parts as NVTX ranges between cudaProfilerStart and Stop, for `nsys
    profile -c cudaProfilerApi`: torch's recorder and nsys read the same counters of a GPU."""
    top: PositiveInt = 10
    """Operations in the table."""

    @field_validator("steps")
    @classmethod
    def in_order(cls, windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """By their first steps."""
        return sorted(windows)

    @model_validator(mode="after")
    def check(self) -> "ProfileConfig":
        """Windows that end before they begin, or overlap."""
        problems = [
            f"steps {first}:{last} ends before it begins; write {last}:{first}"
            for first, last in self.steps
            if last < first
        ]
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if after[0] <= before[1]:
                problems.append(
                    f"steps {before[0]}:{before[1]} and {after[0]}:{after[1]} overlap;"
                    " make them one window"
                )
        if problems:
            raise ProblemsError(problems)
        return self
