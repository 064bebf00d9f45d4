"""Curriculum learning: rows that are short in the first steps and grow to their full length.

The rows of a step are those of the run's order, whatever their length: the tokens beyond the
step's length are left out and never come back.

Source  Li et al. 2021, arXiv:2108.06084; the schedules are those of DeepSpeed, as GPT-NeoX reads
        them from `curriculum_learning`.
"""

from typing import Literal

from pydantic import PositiveInt, model_validator

from castalia.config.base import Config


class CurriculumConfig(Config):
    """Length of the rows by step. Only data/curriculum.py reads these fields."""

    kind: Literal["none", "linear", "root", "discrete"] = "none"
    """none: full rows; linear and root: from shortest to longest over `steps`, as the step or
    a root of it; discrete: the lengths that are listed."""
    shortest: PositiveInt = 64
    """Tokens of a row in the first step."""
    longest: PositiveInt | None = None
    """Tokens of a row at the end of the curriculum; null means data.seq_length."""
    steps: PositiveInt | None = None
    """Steps until longest is reached; null means train.steps."""
    length_step: PositiveInt = 8
    """Tokens of which a length is a multiple, rounded down; kernels are fastest on multiples of
    8."""
    root_degree: PositiveInt = 2
    """root only: 2 grows with the square root of the step."""
    lengths: list[PositiveInt] = []
    """discrete only: the length of each stage, in tokens."""
    until: list[PositiveInt] = []
    """discrete only: last step of each stage but the last, counted from 1."""

    @model_validator(mode="after")
    def check(self) -> "CurriculumConfig":
        """The stages of a discrete curriculum, and bounds that are in order."""
        if self.kind == "discrete":
            if len(self.until) != len(self.lengths) - 1:
                raise ValueError(
                    f"lengths has {len(self.lengths)} stages and until {len(self.until)} ends; give"
                    " the last step of each stage but the last one"
                )
            if sorted(set(self.until)) != self.until:
                raise ValueError(f"until must grow from stage to stage, got {self.until}")
        elif self.lengths or self.until:
            raise ValueError(f"lengths and until belong to kind discrete, not to {self.kind}")
        if self.longest is not None and self.longest < self.shortest:
            raise ValueError(f"longest {self.longest} is below shortest {self.shortest}")
        if self.kind in ("linear", "root") and self.shortest < self.length_step:
            raise ValueError(
                f"shortest {self.shortest} rounds down to 0 tokens: it must be at least"
                f" length_step {self.length_step}"
            )
        return self


class Curriculum:
    """The length of each step's rows: a pure function of its number, so that a resume needs no
    state."""

    def __init__(self, config: CurriculumConfig, seq_length: int, steps: int) -> None:
        """`seq_length` are the tokens of a full row, `steps` those of the run."""
        self.config = config
        self.seq_length = seq_length
        self.steps = config.steps or steps

    def length(self, step: int) -> int:
        """Tokens of the rows of step `step`, counted from 1."""
        config = self.config
        if config.kind == "none":
            return self.seq_length
        if config.kind == "discrete":
            stage = sum(step > last for last in config.until)
            return min(config.lengths[stage], self.seq_length)
        most = config.longest or self.seq_length
        degree = config.root_degree if config.kind == "root" else 1
        share = (step / self.steps) ** (1 / degree)
        length = int(share * (most - config.shortest) + config.shortest)
        length -= length % config.length_step
        return min(length, most, self.seq_length)

    def lengths(self, steps: int) -> list[int]:
        """Every length that the rows of a run of `steps` steps have, in order."""
        if self.config.kind == "none":
            return [self.seq_length]
        return sorted({self.length(step) for step in range(1, steps + 1)})
