"""Agreement between the answers of checkpoints: Cohen's kappa of two models on the same documents.

Two checkpoints may have equal accuracy and answer different documents right. Kappa is the share of
documents on which they answer alike, beyond what their habits of answering would give by chance: 1
for equal answers, 0 for chance. PolyPythias compares each checkpoint with the last one of its run
(self-consistency) and with the same step of another seed.
Source  Cohen 1960, Educational and Psychological Measurement 20; van der Wal et al. 2025,
        arXiv:2503.09543.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import DataError
from castalia.eval.jobs import sample_file
from castalia.results import Result, ResultsStore, find_stores, read_stores

SELF = "self"
SEEDS = "seeds"
SEED = re.compile(r"[-_]?(?:data-|weight-)?seed[-_]?\d+", re.IGNORECASE)
"""The seed in a model's name: `pythia-70m-seed3` and `pythia-70m` are the same model otherwise."""
ACCURACY = ("acc", "exact_match", "em")
"""Metrics that are the share of documents answered right, the first one counts."""

Answers = Mapping[int, Hashable]
"""A model's answer to each document, by the document's number."""


class Agreement(NamedTuple):
    """Two checkpoints on the documents of one task."""

    kind: str
    """`self`: with the last step of the same model; `seeds`: with another seed at the same step."""
    group: str
    """The model without its seed."""
    model: str
    step: int
    other: str
    other_step: int
    task: str
    shots: int | None
    documents: int
    observed: float
    """Share of the documents with equal answers."""
    expected: float
    """Share that would be equal by chance."""
    kappa: float | None
    """None where both give one and the same answer to everything."""
    accuracy: float | None
    """Of the first of the two."""
    other_accuracy: float | None
    """Of the second."""

    def cells(self) -> list[str]:
        """A line of a table."""
        kappa = "-"
        if self.kappa is not None:
            kappa = f"{self.kappa:.3f}"
        names = [self.task, self.model, str(self.step), self.other, str(self.other_step)]
        return [*names, str(self.documents), f"{self.observed:.3f}", kappa]


class Answered(NamedTuple):
    """A checkpoint's answers to a task."""

    suite: str
    model: str
    step: int
    task: str
    shots: int | None
    how: tuple[Any, ...]
    """Arithmetic and version of the task, which must agree."""
    accuracy: float | None
    answers: Answers


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """(p_o - p_e) / (1 - p_e), with the share p_o of equal answers and p_e, the sum over answers of
    the product of both shares; None where p_e is 1.

    Raises  ValueError for other lengths, or none.
    """
    return kappa_of(*shares(one, other))


def kappa_of(observed: float, expected: float) -> float | None:
    """Kappa by the two shares."""
    if expected >= 1:
        return None
    return (observed - expected) / (1 - expected)


def shares(one: Sequence[Hashable], other: Sequence[Hashable]) -> tuple[float, float]:
    """The share of equal answers, and the share that is expected by chance."""
    if len(one) != len(other) or not one:
        raise ValueError(
            f"answers to {len(one)} and {len(other)} documents; expected equal numbers"
        )
    count = len(one)
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / count
    mine = Counter(one)
    theirs = Counter(other)
    expected = sum(mine[answer] * theirs[answer] for answer in mine) / count**2
    return observed, expected


def agreements(paths: Sequence[str], task: str | None = None) -> list[Agreement]:
    """Every comparison that the samples in results stores allow.

    Takes   paths: runs, suites or folders of results, which `castalia eval --samples` wrote.
            task: this task alone.
    Raises  DataError if there are no samples, or nothing to compare.
    """
    stores = [store for path in paths for store in find_stores(path)]
    answered = [each for store in stores for each in answered_in(store, task)]
    if not answered:
        what = ""
        if task is not None:
            what = f" of {task}"
        raise DataError(
            f"no answers{what} in {', '.join(paths)}: run `castalia eval --samples` on checkpoints"
        )
    tasks: dict[tuple[Any, ...], dict[tuple[str, int], Answered]] = defaultdict(dict)
    for each in answered:
        key = (each.suite, group_of(each.model), each.task, each.shots, each.how)
        tasks[key][each.model, each.step] = each
    found = [row for own in tasks.values() for row in compared(own)]
    if not found:
        raise DataError(
            f"{', '.join(paths)} has answers of one step of each model and no second seed; evaluate"
            " more checkpoints with --samples"
        )
    return found


def group_of(model: str) -> str:
    """A model's name without its seed."""
    return SEED.sub("", model) or model


def compared(own: Mapping[tuple[str, int], Answered]) -> Iterator[Agreement]:
    """The comparisons among the checkpoints of one group on one task."""
    steps: dict[str, list[int]] = defaultdict(list)
    for model, step in sorted(own):
        steps[model].append(step)
    for model, saved in steps.items():
        for step in saved[:-1]:
            yield agreement(SELF, own[model, step], own[model, saved[-1]])
    for one, other in combinations(steps, 2):
        for step in sorted(set(steps[one]) & set(steps[other])):
            yield agreement(SEEDS, own[one, step], own[other, step])


def agreement(kind: str, one: Answered, other: Answered) -> Agreement:
    """Two checkpoints on the documents that both answered.

    Raises  DataError if there are none.
    """
    both = sorted(one.answers.keys() & other.answers.keys())
    if not both:
        raise DataError(
            f"{one.model} step {one.step} and {other.model} step {other.step} answered no document"
            f" of {one.task} in common"
        )
    mine = [one.answers[document] for document in both]
    theirs = [other.answers[document] for document in both]
    observed, expected = shares(mine, theirs)
    return Agreement(
        kind,
        group_of(one.model),
        one.model,
        one.step,
        other.model,
        other.step,
        one.task,
        one.shots,
        len(both),
        observed,
        expected,
        kappa_of(observed, expected),
        one.accuracy,
        other.accuracy,
    )


def answered_in(store: ResultsStore, task: str | None) -> Iterator[Answered]:
    """The checkpoints and tasks of which a store has the samples."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for values in read_stores([store]).to_pylist():
        row = Result(**values)
        if row.step is not None and task in (None, row.task):
            how = (row.harness, row.task_hash, row.engine, row.dtype, row.documents)
            model = " ".join(filter(None, (row.model, row.variant)))
            groups[row.suite, model, row.step, row.task, row.shots, how].append(row)
    for (suite, model, step, name, shots, how), rows in groups.items():
        file = sample_file(store.folder, rows)
        if file.is_file():
            accuracy = accuracy_of(rows)
            answers = answers_of(file)
            yield Answered(suite, model, step, name, shots, how, accuracy, answers)


def accuracy_of(rows: Sequence[Result]) -> float | None:
    """The share of documents answered right; None where the task has no such metric."""
    values = {row.metric: row.value for row in reversed(rows)}
    return next((values[name] for name in ACCURACY if name in values), None)


def answers_of(path: Path) -> dict[int, Hashable]:
    """The answers in a file of samples, by document; of several filters the first one's.

    Raises  DataError naming the line that is not a sample.
    """
    answers: dict[int, Hashable] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sample = json.loads(line)
                answers.setdefault(int(sample["doc_id"]), answer_of(sample["filtered_resps"]))
            except (ValueError, KeyError, TypeError, IndexError):
                raise DataError(
                    f"{path}:{number}: expected a sample of castalia eval with doc_id and"
                    " filtered_resps; delete the file and evaluate again"
                ) from None
    return answers


def answer_of(responses: Sequence[Any]) -> Hashable:
    """What a model answered to one document: the number of the choice with the largest
    log-likelihood; for a single continuation whether it is what the model would write; or the text
    that it wrote."""
    first = responses[0]
    if not isinstance(first, list):
        return str(first)
    if len(responses) == 1:
        return bool(first[1])
    # A choice is [log-likelihood, whether greedy decoding gives it].
    likelihoods = [float(each[0]) for each in responses]
    return likelihoods.index(max(likelihoods))
