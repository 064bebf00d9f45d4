"""What is measured on a checkpoint: tasks of the harness and held-out text, each opened once."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.eval import held_out
from castalia.eval.held_out import WHOLE, Source, Windows
from castalia.eval.places import Checkpoint
from castalia.eval.shares import ALONE, Share
from castalia.inference import LanguageModel
from castalia.results import Result
from castalia.results.schema import Labels

if TYPE_CHECKING:
    from castalia.eval.harness.tasks import TaskSet

Samples = Mapping[str, Sequence[Mapping[str, Any]]]
"""By task, each document with its requests, answers and metrics."""


@dataclass(frozen=True)
class WorkOptions:
    """What is measured, and how. Pickles, for worker processes."""

    tasks: tuple[str, ...] = ()
    """Names and files of tasks of the harness; `bits_per_byte` is held-out text."""
    include: tuple[str, ...] = ()
    """Folders of further task files."""
    shots: tuple[int | None, ...] = (None,)
    """Numbers of examples; None is each task's own."""
    limit: float | None = None
    """Documents of each task at most; below 1, a share of them."""
    batch: int = 16
    """Rows in a forward pass."""
    bootstrap: int = 100_000
    """Resamples for errors without a formula."""
    held_out: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of held-out token files by name; empty for the data.valid of each run."""
    windows: Windows = WHOLE
    samples: bool = False
    """Keep each document with its answers."""


class Expected(NamedTuple):
    """A row that a piece of work will have in the results table; None matches any value."""

    task: str
    shots: int | None
    documents: int | None
    harness: str
    task_hash: str

    def matches(self, row: Result) -> bool:
        """Whether a row is this one."""
        return all(wanted in (None, getattr(row, name)) for name, wanted in self._asdict().items())


class Measured(NamedTuple):
    """The outcome of a piece of work."""

    results: list[Result]
    json: dict[str, Any]
    """What the harness writes; empty for held-out text."""
    samples: Samples


class Work(ABC):
    """One task with one number of examples, or the held-out text."""

    name: str
    """As it was asked for."""
    shots: int | None = None
    """As it was asked for."""
    with_samples: tuple[str, ...] = ()
    """The tasks in it whose documents are kept."""

    @abstractmethod
    def expected(self, checkpoint: Checkpoint) -> list[Expected]:
        """The rows of each of its tasks, and of groups of them.

        Raises  ConfigError or DataError if it cannot be measured on the checkpoint.
        """

    @abstractmethod
    def requests(self, checkpoint: Checkpoint) -> int:
        """Texts that the model reads, for the order of a sweep."""

    @abstractmethod
    def measure(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        labels: Labels,
        share: Share = ALONE,
        before: Sequence[Result] = (),
    ) -> Measured:
        """The numbers of a loaded checkpoint; on every rank of `share` the same.

        before  rows of this checkpoint that were measured just now.
        Raises  CastaliaError.
        """


class HarnessWork(Work):
    """One task of the harness."""

    def __init__(self, tasks: "TaskSet", options: WorkOptions) -> None:
        (self.part,) = tasks.parts
        (self.task,) = self.part.tasks.values()
        self.tasks = tasks
        self.options = options
        self.name = self.part.name
        self.shots = tasks.shots
        if options.samples:
            self.with_samples = (self.name,)

    def expected(self, checkpoint: Checkpoint) -> list[Expected]:
        """See `Work`."""
        from castalia.eval.harness.evaluate import harness_name

        digest = self.part.hashes(self.tasks.prompting())[self.name]
        return [Expected(self.name, self.examples, self.documents(), harness_name(), digest)]

    @property
    def examples(self) -> int | None:
        """Number of examples, as the task has it."""
        shots: int | None = self.task.config.num_fewshot
        return shots

    def metrics(self) -> set[str]:
        """Names of its metrics."""
        return set(self.task.aggregation())

    def documents(self) -> int:
        """Documents that are read."""
        from lm_eval.evaluator_utils import get_sample_size

        count = len(self.task.eval_docs)
        limit = get_sample_size(self.task, self.options.limit)
        if limit is None:
            return count
        return min(count, limit)

    def requests(self, checkpoint: Checkpoint) -> int:
        """See `Work`."""
        return self.tasks.requests[self.name]

    def measure(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        labels: Labels,
        share: Share = ALONE,
        before: Sequence[Result] = (),
    ) -> Measured:
        """See `Work`."""
        from castalia.eval.harness.evaluate import evaluate

        options = self.options
        done = evaluate(
            model,
            self.tasks,
            batch=options.batch,
            bootstrap=options.bootstrap,
            share=share,
            samples=options.samples,
        )
        return Measured(done.results(labels), plain(done.json), done.samples)


def plain(value: Any) -> Any:
    """A value of the harness as JSON has it; a function of a task file is its name, as the harness
    writes it."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))


class HeldOutWork(Work):
    """The held-out text, every source of it."""

    name = held_out.TASK

    def __init__(self, options: WorkOptions) -> None:
        self.options = options

    def sources(self, checkpoint: Checkpoint) -> list[Source]:
        """The text for a checkpoint.

        Raises  ConfigError if there is none; DataError if it cannot be read.
        """
        options = self.options
        return held_out.sources_of(checkpoint.run, options.held_out, options.windows, options.limit)

    def expected(self, checkpoint: Checkpoint) -> list[Expected]:
        """See `Work`."""
        return [
            Expected(source.task, 0, source.documents, held_out.HARNESS, source.hash)
            for source in self.sources(checkpoint)
        ]

    def requests(self, checkpoint: Checkpoint) -> int:
        """See `Work`."""
        return sum(source.documents for source in self.sources(checkpoint))

    def measure(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        labels: Labels,
        share: Share = ALONE,
        before: Sequence[Result] = (),
    ) -> Measured:
        """See `Work`."""
        rows: list[Result] = []
        for source in self.sources(checkpoint):
            rows += held_out.measure(
                model,
                source,
                labels,
                windows=self.options.windows,
                batch=self.options.batch,
                share=share,
            )
        return Measured(rows, {}, {})


def open_work(options: WorkOptions) -> list[Work]:
    """Everything that is asked for, with its data; each task with each number of examples once.

    Raises  ConfigError for an unknown task, a broken task file, or a missing package; DataError for
            a task without data.
    """
    names = [name for name in options.tasks if name != held_out.TASK]
    work: list[Work] = []
    if len(names) < len(options.tasks):
        work.append(HeldOutWork(options))
    elif options.held_out:
        raise ConfigError(f"--held-out is read by --tasks {held_out.TASK}, which is not asked for")
    if not names:
        return work
    from castalia.core.extras import require

    require("lm_eval", "eval", "evaluation with lm-evaluation-harness")
    from castalia.eval.harness.tasks import open_tasks

    for shots in options.shots:
        opened = open_tasks(names, include=options.include, shots=shots, limit=options.limit)
        for tasks in opened.split():
            work += work_of(tasks, options, work)
    return work


def work_of(tasks: "TaskSet", options: WorkOptions, before: Sequence[Work]) -> list[Work]:
    """Each task of a name on its own, so that a kill loses one, and then its groups' numbers.

    before  what is measured already; a task that fixes its number of examples is the same for every
            --shots.
    """
    from castalia.eval.groups import GroupWork  # it reads the rows of tasks

    known = {(each.name, each.examples) for each in before if isinstance(each, HarnessWork)}
    (part,) = tasks.parts
    members = [HarnessWork(each, options) for each in tasks.each_task()]
    work: list[Work] = [each for each in members if (each.name, each.examples) not in known]
    if any(group.has_aggregation for group in part.loaded["groups"].values()) and work:
        work.append(GroupWork(tasks, members))
    return work
