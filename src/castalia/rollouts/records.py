"""What is kept of answers: lines of samples/rollouts.jsonl, metrics, and the state of a run."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.core.log_lines import CHANGED, LineLog, read_log, step_of, write_log
from castalia.rollouts.answers import Answer
from castalia.rollouts.rows import Judged

RECORD = Path("samples") / "rollouts.jsonl"
RECORDED = 8
"""Prompts of a step whose answers are written."""


class RolloutFile:
    """The answers of some steps, one a line, in a run's folder."""

    def __init__(self, folder: str) -> None:
        self.log = LineLog(Path(folder) / RECORD)
        self.is_open = False

    def write(
        self, step: int, groups: Mapping[int, Sequence[Judged]], prompt_at: Callable[[int], Any]
    ) -> None:
        """Add the answers to the first prompts of a step; those that a run before a resume wrote of
        it and of later steps are dropped, and damaged lines are left out with a warning.

        Takes   groups: answers by the place of their prompt; prompt_at: the prompt at a place.
        """
        # Only now: a resume that stops before it has answers leaves the file alone.
        if not self.is_open:
            self.is_open = True
            self.drop_from(step)
            self.log.open()
        for place in sorted(groups)[:RECORDED]:
            prompt = prompt_at(place)
            for one in groups[place]:
                facts = {
                    "step": step,
                    "prompt": prompt,
                    "completion": one.answer.text,
                    "reward": one.reward,
                    "advantage": one.advantage,
                    "tokens": len(one.answer.ids),
                    "ended": one.answer.has_ended,
                }
                self.log.append(json.dumps(facts, ensure_ascii=False), step)

    def drop_from(self, step: int) -> None:
        """Keep the lines of earlier steps."""
        if not self.log.path.is_file():
            return
        kept = []
        for line in read_log(self.log.path):
            number = step_of(line.text)
            if number is not None and number >= step:
                break
            if line.fault:
                warnings.warn(
                    f"{self.log.path} line {line.number} is damaged: {line.fault}", stacklevel=2
                )
            if number is not None and line.fault != CHANGED:
                kept.append(line.text)
        write_log(self.log.path, kept)


def facts_of(groups: Iterable[Sequence[Judged]], names: Sequence[str]) -> dict[str, float]:
    """Metrics of a set of answers; `names` are those of its rewards."""
    judged = [one for group in groups for one in group]
    mean = sum(one.reward for one in judged) / len(judged)
    variance = sum((one.reward - mean) ** 2 for one in judged) / len(judged)
    facts = {
        "reward_std": math.sqrt(variance),
        "answer_tokens": sum(len(one.answer.ids) for one in judged) / len(judged),
        "ended": sum(one.answer.has_ended for one in judged) / len(judged),
    }
    # The mean of a single reward is `reward` itself, which the loss logs.
    if len(names) < 2:
        return facts
    for place, name in enumerate(names):
        values = [value for one in judged if (value := one.parts[place]) is not None]
        if values:
            facts[f"rewards/{name}"] = sum(values) / len(values)
    return facts


def as_json(one: Judged) -> list[Any]:
    """An answer as JSON values."""
    return [list(one.answer), *one[1:]]


def from_json(values: Sequence[Any]) -> Judged:
    """The answer behind JSON values."""
    return Judged(Answer(*values[0]), *values[1:])
