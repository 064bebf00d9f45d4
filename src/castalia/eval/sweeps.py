"""Sweeps: many checkpoints on many tasks, cheapest first, into a results table.

What stands in the table already is not measured again, so that the same command continues a sweep
that was stopped. Rows are added after each task of each checkpoint.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch

from castalia.core.errors import CastaliaError
from castalia.core.workers import WorkerPool
from castalia.eval.found import Found, Subject
from castalia.eval.jobs import (
    Done,
    Failure,
    Job,
    JobOptions,
    begin_worker,
    has_samples,
    run_in_worker,
    run_jobs,
)
from castalia.eval.labels import REFERENCE, ahead, config_of_run, size_in
from castalia.eval.places import Checkpoint, origin_of_export
from castalia.eval.shares import ALONE, Share
from castalia.eval.single_models import weight_bytes
from castalia.eval.work import Expected, Work, WorkOptions, open_work
from castalia.models import build_model_config, parameter_counts
from castalia.results import Result, ResultsStore

Say = Callable[[str], None]
UNITS = {"m": 1e6, "b": 1e9}


class Part(NamedTuple):
    """One task of a checkpoint."""

    shots: int | None
    """Number of examples as it was asked for; None is the task's own."""
    rows: list[Result]
    """Of the task, new or found."""
    json: dict[str, Any]
    """What the harness writes about it; empty if it was found, and for held-out text."""


@dataclass
class Outcome:
    """What a sweep knows about one checkpoint when it ends."""

    checkpoint: Checkpoint
    parts: list[Part] = field(default_factory=list)
    """One for each task with a number of examples."""
    reference: list[Result] = field(default_factory=list)
    """All rows in REFERENCE, where the sweep was asked to compare with it."""
    measured: int = 0
    """Tasks that were measured now."""
    found: int = 0
    """Tasks that stood in the table already."""
    failures: list[Failure] = field(default_factory=list)
    written: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By place of each task that was measured now, what the harness writes about it."""

    @property
    def rows(self) -> list[Result]:
        """All rows in the arithmetic that was asked for."""
        return [row for part in self.parts for row in part.rows]


class Plan(NamedTuple):
    """What is left to do, cheapest first, and what is not."""

    jobs: list[tuple[Job, ...]]
    """Of one checkpoint each."""
    outcomes: dict[str, Outcome]
    """By path of the checkpoint."""


def sweep(
    checkpoints: Sequence[Checkpoint],
    asked: WorkOptions,
    options: JobOptions,
    *,
    processes: int = 1,
    share: Share = ALONE,
    say: Say = print,
) -> list[Outcome]:
    """Measure checkpoints, and add the numbers to their tables; outcomes in the given order.

    An error of one checkpoint or task is noted in its outcome, and the others go on.
    asked       the tasks.
    options     the arithmetic, and whether rows that are there count.
    processes   worker processes; each takes whole checkpoints.
    share       this rank among those that measure every checkpoint together.
    say         called with one line of text for each task of each checkpoint.
    Raises      ConfigError or DataError for tasks that cannot be opened, or a damaged table;
                CastaliaError where a table cannot be written, before anything is measured or, as
                when the disk fills, after the task whose numbers found no room.
    """
    work = open_work(asked)
    plan = planned(checkpoints, work, options)
    # Rank 0 alone decides what is left: another may read the table a moment later.
    plan = share.gather(plan)[0]
    announce(plan, work, say)
    total = sum(len(job.left) for jobs in plan.jobs for job in jobs)
    numbers = count(1)

    def counted(text: str) -> None:
        say(f"{text}  {next(numbers)}/{total}")

    for done in executed(plan.jobs, work, asked, processes, share, counted):
        outcome = plan.outcomes[done.job.owner]
        outcome.measured += len(done.written)
        outcome.failures += done.failures
        if not done.job.is_reference:
            outcome.written |= done.written
    gather_rows(plan.outcomes.values(), work, options)
    return [plan.outcomes[checkpoint.path] for checkpoint in checkpoints]


def planned(checkpoints: Sequence[Checkpoint], work: Sequence[Work], options: JobOptions) -> Plan:
    """The jobs that are left, and the outcomes so far."""
    found = Found(checkpoints)
    costs: dict[tuple[Job, ...], float] = {}
    outcomes: dict[str, Outcome] = {}
    begun: set[tuple[object, ...]] = set()
    for checkpoint in checkpoints:
        outcome = Outcome(checkpoint)
        outcomes[checkpoint.path] = outcome
        jobs: list[Job] = []
        requests = 0
        for job in jobs_of(checkpoint, options):
            left: list[int] = []
            for place, item in enumerate(work):
                try:
                    expected = item.expected(job.checkpoint)
                except CastaliaError as error:
                    outcome.failures.append(Failure(item.name, str(error), error.exit_code))
                    continue
                if not options.again and is_known(found, job, item, expected):
                    outcome.found += not job.is_reference
                    continue
                # Two exports have one reference, and a checkpoint may have two paths.
                subject = Subject(job.checkpoint, job.how).identity
                if (place, subject) in begun:
                    continue
                begun.add((place, subject))
                left.append(place)
                requests += item.requests(job.checkpoint)
            if left:
                jobs.append(job._replace(left=tuple(left)))
        if jobs:
            costs[tuple(jobs)] = parameters_of(checkpoint) * requests
    for folder in {job.checkpoint.stores[0] for jobs in costs for job in jobs}:
        ResultsStore(folder).require_writable()
    # Sorting keeps the order of equal costs: the steps of a run as they came.
    return Plan(sorted(costs, key=lambda jobs: costs[jobs]), outcomes)


def is_known(found: Found, job: Job, item: Work, expected: Sequence[Expected]) -> bool:
    """Whether all that a task would give is there, its samples too if they are asked for."""
    subject = Subject(job.checkpoint, job.how)
    if not found.has_all(subject, expected):
        return False
    kept = [row for row in found.rows_of(subject, expected) if row.task in item.with_samples]
    return has_samples(job, kept)


def jobs_of(checkpoint: Checkpoint, options: JobOptions) -> Iterator[Job]:
    """The arithmetics in which a checkpoint is measured: as asked, and the reference."""
    how = options.how
    yield Job(checkpoint, how, checkpoint.path)
    exact = REFERENCE._replace(device=how.device, verify=how.verify)
    if not options.compares or ahead(checkpoint.path, how) == ahead("", exact):
        return
    origin = origin_of_export(checkpoint)
    if origin is not None:
        yield Job(origin, exact, checkpoint.path, is_reference=True)


def parameters_of(checkpoint: Checkpoint) -> float:
    """Parameters of a checkpoint for the order of a sweep: by its run's config, else its name, else
    the sizes of its files; infinite if nothing says it."""
    if checkpoint.run is not None:
        values = config_of_run(checkpoint.run).get("model")
        if isinstance(values, dict):
            try:
                return parameter_counts(build_model_config(values, checkpoint.path)).total
            except CastaliaError:  # opening it will say more
                return math.inf
    size = size_in(checkpoint.model)
    if size is not None:
        return float(size[:-1]) * UNITS[size[-1]]
    return weight_bytes(checkpoint.path) / 4 or math.inf


def announce(plan: Plan, work: Sequence[Work], say: Say) -> None:
    """One line about what is left, if some of it is not."""
    found = sum(outcome.found for outcome in plan.outcomes.values())
    if found:
        left = sum(len(job.left) for jobs in plan.jobs for job in jobs)
        total = len(plan.outcomes) * len(work)
        say(f"{found} of {total} results are in the table already; {left} to measure")


def executed(
    groups: Sequence[tuple[Job, ...]],
    work: Sequence[Work],
    asked: WorkOptions,
    processes: int,
    share: Share,
    say: Say,
) -> Iterator[Done]:
    """Run the jobs of each checkpoint, one after the other or in worker processes."""
    if processes == 1 or len(groups) < 2:
        for jobs in groups:
            yield from run_jobs(jobs, work, share, say)
        return
    assert share.size == 1, "the ranks of a launcher share each checkpoint"
    yield from in_workers(groups, asked, min(processes, len(groups)), say)


def in_workers(
    groups: Sequence[tuple[Job, ...]], asked: WorkOptions, processes: int, say: Say
) -> Iterator[Done]:
    """Run jobs in worker processes, each of which opens the tasks for itself.

    A worker that dies, for instance for lack of memory, ends them all; what is left then fails.
    """
    threads = max(1, torch.get_num_threads() // processes)
    pool = WorkerPool(processes, begin_worker, (asked, threads))
    futures = {pool.submit(run_in_worker, jobs): jobs for jobs in groups}
    try:
        for future in as_completed(futures):
            try:
                done, said = future.result()
            except BrokenProcessPool:
                reason = pool.why_none_began or (
                    "a worker process died, most likely for lack of memory; the same command with"
                    " fewer --jobs continues"
                )
                yield Done(futures[future][0], [Failure(None, reason)], {})
                continue
            for text in said:
                say(text)
            yield from done
    except BaseException:
        # A request to stop: the rows of finished tasks are in the table, and nobody waits longer.
        pool.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def gather_rows(outcomes: Iterable[Outcome], work: Sequence[Work], options: JobOptions) -> None:
    """Read the rows of all that was asked for, new and found."""
    outcomes = list(outcomes)
    found = Found(outcome.checkpoint for outcome in outcomes)
    for outcome in outcomes:
        for job in jobs_of(outcome.checkpoint, options):
            for place, item in enumerate(work):
                try:
                    expected = item.expected(job.checkpoint)
                except CastaliaError:  # noted when the work was planned
                    continue
                rows = found.rows_of(Subject(job.checkpoint, job.how), expected)
                if job.is_reference:
                    outcome.reference += rows
                else:
                    written = outcome.written.get(place, {})
                    outcome.parts.append(Part(item.shots, rows, written))
