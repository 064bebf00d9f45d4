"""Arithmetic questions of the term-frequency study: a template, its examples, the answer."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from castalia.core.errors import ConfigError, nearest

QUESTION = "Q:What is {x1} {op} {x2}? A: {answer}"
"""The published prompt.

Source  Pythia's case-studies/term-frequency, after Razeghi et al. 2022, arXiv:2202.07206.
"""
FIELDS = ("x1", "op", "x2", "answer")
TASKS = {"multiplication": "times", "addition": "plus"}
"""Task -> the word of its operation."""
NUMBER = re.compile(r"\d{1,5}")
"""A number as the published study reads it from an answer."""


class Item(NamedTuple):
    """One question."""

    x1: int
    """The operand whose frequency is studied."""
    x2: int
    prompt: str
    answer: int


@dataclass(frozen=True)
class Questions:
    """How questions are asked."""

    operands: range
    """First operands."""
    seconds: range
    """Second operands."""
    template: str = QUESTION
    between: str = "\n\n"
    """Between two examples."""
    seed: int = 0

    def check(self) -> None:
        """Raises  ConfigError for a template without its fields, or too few operands."""
        names = re.findall(r"\{(\w*)\}", self.template)
        wrong = [name for name in names if name not in FIELDS]
        if wrong:
            near = nearest(wrong[0], FIELDS)
            raise ConfigError(
                f"--template {self.template!r}: unknown field {{{wrong[0]}}}; choose from {{x1}},"
                f" {{op}}, {{x2}}, {{answer}}{near}"
            )
        if sorted(names) != sorted(FIELDS) or names[-1] != "answer":
            raise ConfigError(
                f"--template {self.template!r}: expected {{x1}}, {{op}} and {{x2}} once each, and"
                f" {{answer}} after them, as in {QUESTION!r}"
            )
        if len(self.operands) < 2 or not len(self.seconds):
            raise ConfigError("expected at least two --operands and one of --seconds")
        if min(*self.operands, *self.seconds) < 0:
            raise ConfigError("expected operands from 0 on")

    def items(self, task: str, shots: int) -> Iterator[Item]:
        """The questions of a task, each behind `shots` examples with other first operands."""
        word = TASKS[task]
        for x1 in self.operands:
            for x2 in self.seconds:
                examples = [
                    self.filled(word, a, b, task) + self.between
                    for a, b in self.examples(task, x1, x2, shots)
                ]
                question, _, _ = self.template.partition("{answer}")
                own = question.format(x1=x1, op=word, x2=x2)
                # The space before an answer belongs to its first token.
                yield Item(x1, x2, "".join(examples) + own.rstrip(" "), solved(task, x1, x2))

    def examples(self, task: str, x1: int, x2: int, shots: int) -> list[tuple[int, int]]:
        """Operands of the examples of a question: more of them begin with the same ones."""
        if not shots:
            return []
        draws = random.Random(f"{self.seed}/{task}/{x1}/{x2}")
        others = [operand for operand in self.operands if operand != x1]
        return [(draws.choice(others), draws.choice(self.seconds)) for _ in range(shots)]

    def filled(self, word: str, x1: int, x2: int, task: str) -> str:
        """An example: the template with its answer."""
        return self.template.format(x1=x1, op=word, x2=x2, answer=solved(task, x1, x2))


MOST_SHOTS = 64
"""Examples that can be asked for."""


def solved(task: str, x1: int, x2: int) -> int:
    """The answer of a question."""
    if task == "multiplication":
        return x1 * x2
    return x1 + x2


def is_right(text: str, answer: int) -> bool:
    """Whether the first number of a continuation, up to its first line break, is the answer."""
    found = NUMBER.search(text.partition("\n")[0])
    return found is not None and int(found[0]) == answer


def tasks_named(names: Sequence[str]) -> list[str]:
    """The tasks that are asked for.

    Raises  ConfigError for an unknown one.
    """
    for name in names:
        if name not in TASKS:
            raise ConfigError(
                f"--tasks: unknown task {name!r}; choose from {', '.join(TASKS)}"
                f"{nearest(name, TASKS)}"
            )
    return list(dict.fromkeys(names))
