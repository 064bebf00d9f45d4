"""One job of a sweep: a checkpoint is loaded once and measured on all that is left of its tasks."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import CastaliaError, CheckpointError
from castalia.core.files import atomic_write, is_claimed
from castalia.eval.labels import REFERENCE, USUAL, Arithmetic, labels_of
from castalia.eval.places import Checkpoint
from castalia.eval.shares import ALONE, Share
from castalia.eval.work import Measured, Work, WorkOptions, open_work
from castalia.inference import LanguageModel
from castalia.inference.loading import load_exact
from castalia.results import Result, ResultsStore
from castalia.results.schema import Labels

SAMPLES = "samples"
"""Folder of documents with their answers, beside a table."""
TURN_SECONDS = 45.0
"""Longest wait for other writers of a table before its own lock is asked, which says who has it."""
SHOWN = ("acc", "acc_norm", "perplexity", "word_perplexity", "exact_match", "bits_per_byte")
"""Metrics that a line about a task shows first."""


@dataclass(frozen=True)
class JobOptions:
    """How checkpoints are computed, and which numbers count. Pickles, for worker processes."""

    how: Arithmetic = USUAL
    again: bool = False
    """Measure also what stands in the table."""
    compares: bool = True
    """Measure in the reference arithmetic, too, where `how` is another."""


class Job(NamedTuple):
    """A checkpoint in one arithmetic."""

    checkpoint: Checkpoint
    how: Arithmetic
    owner: str
    """Path of the checkpoint whose outcome it is part of: an export's reference is another one."""
    is_reference: bool = False
    left: tuple[int, ...] = ()
    """Places of the tasks that are left, in the list of all."""


class Failure(NamedTuple):
    """A task of a checkpoint that could not be measured."""

    task: str | None
    """None for all tasks: the checkpoint could not be loaded."""
    reason: str
    exit_code: int = 1


class Done(NamedTuple):
    """The outcome of a job."""

    job: Job
    failures: list[Failure]
    written: dict[int, dict[str, Any]]
    """By place of each task that was measured, what the harness writes about it."""


Say = Callable[[str], None]


def run_jobs(jobs: Sequence[Job], work: Sequence[Work], share: Share, say: Say) -> Iterator[Done]:
    """The jobs of one checkpoint; without numbers there is nothing to compare a reference with."""
    for job in jobs:
        done = run_job(job, work, share, say)
        yield done
        if done.failures and not done.written:
            return


def run_job(job: Job, work: Sequence[Work], share: Share, say: Say) -> Done:
    """Measure what is left of a job; every rank of `share` calls it, the first one writes.

    Errors are noted, and the other tasks go on.
    Raises  CastaliaError if the numbers cannot be written: those of later tasks would be lost, too.
    """
    done = Done(job, [], {})
    try:
        model, labels = loaded(job, share)
    except CastaliaError as error:
        done.failures.append(Failure(None, str(error), error.exit_code))
        return done
    before: list[Result] = []
    for place in job.left:
        item = work[place]
        started = time.perf_counter()
        try:
            numbers = item.measure(model, job.checkpoint, labels, share, before)
        # Also what no check foresaw, such as too little memory: the other tasks may still work.
        except Exception as error:
            done.failures.append(failure_of(item.name, error))
            continue
        keep(job, numbers, share)
        before += numbers.results
        done.written[place] = numbers.json
        say(line(job, item, numbers, time.perf_counter() - started))
    return done


def loaded(job: Job, share: Share) -> tuple[LanguageModel, Labels]:
    """The model on every rank, and its labels.

    Raises  CheckpointError or ConfigError on every rank if it cannot be loaded on one.
    """
    checkpoint = job.checkpoint
    reason: CastaliaError | None = None
    try:
        model = load_exact(checkpoint.path, **job.how._asdict())
        labels = labels_of(checkpoint.path, model)
    except CastaliaError as error:
        reason = error
    except Exception as error:  # a damaged file that no check of ours knows
        reason = CheckpointError(f"{checkpoint.path}: {in_one_line(error)}")
    for failed in share.gather(reason):
        if failed is not None:
            raise failed
    step = checkpoint.step
    if labels.step is not None:
        step = labels.step
    return model, labels._replace(
        step=step, variant=checkpoint.variant, checkpoint_hash=checkpoint.weights_hash
    )


def failure_of(task: str | None, error: Exception) -> Failure:
    """An error as it is noted."""
    if isinstance(error, CastaliaError):
        return Failure(task, str(error), error.exit_code)
    return Failure(task, in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def keep(job: Job, numbers: Measured, share: Share) -> None:
    """Write the numbers on the first rank.

    Raises  CastaliaError on every rank if that fails.
    """
    reason: CastaliaError | None = None
    if share.rank == 0:
        try:
            write(job, numbers)
        except CastaliaError as error:
            reason = error
    (reason, *_) = share.gather(reason)
    if reason is not None:
        raise reason


def write(job: Job, numbers: Measured) -> None:
    """Add the rows to the table, and write the samples beside it."""
    store = ResultsStore(job.checkpoint.stores[0])
    for task, rows in by_task(numbers.results).items():
        if task in numbers.samples:  # a group has none of its own
            write_samples(sample_file(store.folder, rows), numbers.samples[task])
    # Other workers write for milliseconds; the lock itself would announce each wait.
    deadline = time.monotonic() + TURN_SECONDS
    while is_claimed(store.folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    store.add(numbers.results)


def by_task(rows: Sequence[Result]) -> dict[str, list[Result]]:
    """The rows of each task."""
    tasks: dict[str, list[Result]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def sample_file(folder: Path, rows: Sequence[Result]) -> Path:
    """Where the documents of a task with their answers go, of which `rows` are the numbers."""
    row = rows[0]
    words = [row.model, *([row.variant] if row.variant else [])]
    if row.step is not None:
        words.append(f"step{row.step}")
    words += [row.task, f"{row.shots}shot", str(row.engine), str(row.dtype)]
    # Answers of other weights, to a changed task or of another --limit are another file, and so
    # are those of a name that differs in characters which no file name has.
    facts = [*words, row.suite, row.harness, row.task_hash, row.checkpoint_hash]
    facts.append(str(max(each.documents or 0 for each in rows)))
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    return folder / SAMPLES / (re.sub(r"[^\w.-]+", "_", "-".join(words)) + f"-{digest}.jsonl")


def has_samples(job: Job, rows: Sequence[Result]) -> bool:
    """Whether the documents of every task of some rows were written before."""
    folder = ResultsStore(job.checkpoint.stores[0]).folder
    return all(sample_file(folder, each).is_file() for each in by_task(rows).values())


def write_samples(path: Path, documents: Sequence[Any]) -> None:
    """One document a line."""
    with atomic_write(path) as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False, default=str) + "\n")


def line(job: Job, item: Work, numbers: Measured, seconds: float) -> str:
    """One task of a checkpoint as a line of text."""

    def order(row: Result) -> tuple[bool, int]:
        # What was asked for by name, then the usual metric.
        # Metrics without a place in the list come last.
        if row.metric in SHOWN:
            place = SHOWN.index(row.metric)
        else:
            place = len(SHOWN)
        return row.task != item.name, place

    shown = sorted(numbers.results, key=order)
    texts = [f"{row.task} {row.metric} {number_text(row)}" for row in shown[:2]]
    if item.shots is not None:
        texts[0] = f"{item.shots}-shot {texts[0]}"
    more = ""
    if len(shown) > 2:
        more = f", and {len(shown) - 2} more"
    kind = ""
    if job.is_reference:
        kind = " (reference)"
    elif (shown[0].engine, shown[0].dtype) != (REFERENCE.engine, REFERENCE.dtype):
        kind = f" ({shown[0].engine} {shown[0].dtype})"
    return f"{job.checkpoint.title}{kind}  {', '.join(texts)}{more}  {seconds:.1f} s"


def number_text(row: Result) -> str:
    """A value with its error."""
    if row.stderr is None:
        return f"{row.value:.4g}"
    return f"{row.value:.4g} ± {row.stderr:.2g}"


WORKER: dict[str, Any] = {}
"""The tasks of this worker process, opened when it starts."""


def begin_worker(state: tuple[WorkOptions, int]) -> None:
    """In a worker: open the tasks, and leave the other cores to other workers."""
    import torch

    asked, threads = state
    torch.set_num_threads(threads)
    # As the main process does: what the functions of a task print is no result.
    sys.stdout = sys.stderr
    WORKER["work"] = open_work(asked)


def run_in_worker(jobs: Sequence[Job]) -> tuple[list[Done], list[str]]:
    """In a worker: the jobs of a checkpoint, and the lines that they would have said."""
    said: list[str] = []
    return list(run_jobs(jobs, WORKER["work"], ALONE, said.append)), said
