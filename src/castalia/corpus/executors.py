"""Execution of a job's parts: in this process, in local worker processes, or on a Ray cluster."""

import socket
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from castalia.core.errors import CastaliaError, ConfigError
from castalia.core.extras import require
from castalia.core.memory import keep_freed_memory
from castalia.core.workers import WorkerPool
from castalia.corpus.encoding import Encoder, leave_cores
from castalia.corpus.job import PrepareJob
from castalia.corpus.part_encoding import encode_part
from castalia.corpus.part_files import PartRecord
from castalia.corpus.parts import JobPart

AHEAD = 2
"""Parts queued beyond one for each worker, so that none waits for the next. More would hold more
memory: a queued part may carry its bytes."""
ATTEMPTS = 3
"""Times a part is given out before the deaths of its workers end the job."""
RAY_SECONDS = 10.0
"""Seconds until a Ray cluster must answer."""
Results = Generator[tuple[JobPart, PartRecord], None, None]
PlannedParts = Iterator[tuple[JobPart, PartRecord | None]]
"""Parts in order, with the record of an earlier run; None for a part that must be encoded."""


def encode_in_this_process(job: PrepareJob, planned: PlannedParts) -> Results:
    """Encode each part when its result is asked for."""
    encoder = None
    for part, record in planned:
        if record is None:
            if encoder is None:
                encoder = Encoder(job.tokenizer, fast=job.fast)
            record = encode_part(job, part, encoder)
        yield part, record


WORKER: dict[str, Any] = {}
"""Job and encoder of this worker process, set when it starts."""


def start_worker(job: PrepareJob) -> None:
    """In a worker: keep the job, build the encoder, and leave the other cores to other workers."""
    leave_cores()
    keep_freed_memory()
    WORKER["job"] = job
    WORKER["encoder"] = Encoder(job.tokenizer, fast=job.fast)


def encode_in_worker(part: JobPart) -> PartRecord:
    """In a worker: encode one part."""
    return encode_part(WORKER["job"], part, WORKER["encoder"])


class LocalWorkers:
    """Worker processes of this machine.

    A worker that dies breaks the whole pool (`BrokenProcessPool`): a new pool is started, and the
    lost parts are given out again.
    """

    def __init__(self, job: PrepareJob, workers: int) -> None:
        self.job = job
        self.workers = workers
        self.attempts: dict[int, int] = {}
        """Times that each part was given out."""
        self.queue: deque[tuple[JobPart, PartRecord | None, Future[PartRecord] | None]] = deque()
        """Parts in order; one with a record needs no future."""
        self.start()

    def start(self) -> None:
        """Start new processes."""
        self.pool = WorkerPool(self.workers, start_worker, self.job)

    def run(self, planned: PlannedParts) -> Results:
        """The results in order; few parts are queued at a time, so memory stays bounded."""
        try:
            while True:
                self.fill_queue(planned)
                if not self.queue:
                    return
                yield self.next_result()
        finally:
            # Idle workers exit by themselves. After an error, some still write parts: wait for
            # them, or they would write into a folder that is no longer locked.
            self.pool.shutdown(wait=bool(self.queue), cancel_futures=True)

    def fill_queue(self, planned: PlannedParts) -> None:
        """Give out parts until every worker has one and AHEAD more are queued."""
        while len(self.queue) < self.workers + AHEAD:
            planned_part = next(planned, None)
            if planned_part is None:
                return
            part, record = planned_part
            future = None
            if record is None:
                future = self.submit(part)
            self.queue.append((part, record, future))

    def submit(self, part: JobPart) -> Future[PartRecord]:
        """Give out a part.

        Raises  CastaliaError if it was given out too often.
        """
        self.attempts[part.number] = self.attempts.get(part.number, 0) + 1
        if self.attempts[part.number] > ATTEMPTS:
            raise CastaliaError(
                f"{part.extents[0].where}: the process working on it died {ATTEMPTS} times, most"
                " likely for lack of memory; use fewer --workers"
            )
        try:
            return self.pool.submit(encode_in_worker, part)
        except BrokenProcessPool as error:
            # Found while submitting: reported in order, like a death while working.
            broken: Future[PartRecord] = Future()
            broken.set_exception(error)
            return broken

    def next_result(self) -> tuple[JobPart, PartRecord]:
        """The oldest part with its record; waits for it."""
        while True:
            part, record, future = self.queue[0]
            try:
                if future is not None:
                    record = future.result()
            except BrokenProcessPool:
                self.restart()
                continue
            self.queue.popleft()
            assert record is not None
            return part, record

    def restart(self) -> None:
        """Start new processes and give out the lost parts again.

        Raises  CastaliaError if no worker ever started.
        """
        self.pool.shutdown(cancel_futures=True)
        reason = self.pool.why_none_began
        if reason is not None:
            raise CastaliaError(reason)
        self.start()
        for i, (part, record, future) in enumerate(self.queue):
            if future is not None and is_lost(future):
                self.queue[i] = (part, record, self.submit(part))


def is_lost(future: Future[PartRecord]) -> bool:
    """Whether a future of a broken pool has no result."""
    return not future.done() or future.cancelled() or future.exception() is not None


def run_parts(
    job: PrepareJob, planned: PlannedParts, workers: int, engine: str, address: str | None
) -> Results:
    """Every part with its record, in order. `engine` is `local` or `ray`.

    Raises  CastaliaError from a worker; ConfigError about an unknown engine.
    """
    if engine == "ray":
        return encode_on_ray(job, planned, workers, address)
    if engine != "local":
        raise ConfigError(f"unknown --engine {engine!r}; choose one of local, ray")
    if workers == 1:
        return encode_in_this_process(job, planned)
    return LocalWorkers(job, workers).run(planned)


def encode_on_ray(
    job: PrepareJob, planned: PlannedParts, workers: int, address: str | None
) -> Results:
    """Parts as tasks of a Ray cluster whose machines share the work folder; Ray retries lost ones.

    Raises  ConfigError if ray is not installed; CastaliaError if a part is lost ATTEMPTS times.
    """
    ray = require("ray", "ray", "--engine ray")
    must_start = not ray.is_initialized()
    if must_start:
        join_cluster(ray, address)
    task = ray.remote(num_cpus=1, max_retries=ATTEMPTS, max_calls=0)(encode_in_ray_worker)
    shared_job = ray.put(job)  # sent to each machine once, not with every task
    queue: deque[tuple[JobPart, Any]] = deque()
    try:
        while True:
            while len(queue) < workers + AHEAD and (entry := next(planned, None)) is not None:
                part, record = entry
                queue.append((part, record or task.remote(shared_job, part)))
            if not queue:
                return
            part, pending = queue.popleft()
            yield part, ray_result(ray, part, pending)
    finally:
        if must_start:
            ray.shutdown()


def ray_result(ray: Any, part: JobPart, pending: Any) -> PartRecord:
    """The record of a part, waited for if it is a Ray task.

    Raises  CastaliaError of the task, or about a lost one.
    """
    if isinstance(pending, PartRecord):
        return pending
    try:
        record: PartRecord = ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CastaliaError):
            raise error.cause from None
        raise CastaliaError(f"a Ray task failed: {error.cause}") from None
    except ray.exceptions.RayError as error:
        raise CastaliaError(
            f"{part.extents[0].where}: lost on the Ray cluster: {error}; run the same command to"
            " continue"
        ) from None
    return record


def join_cluster(ray: Any, address: str | None) -> None:
    """Connect to a Ray cluster; without an address, start one on this machine.

    Raises  ConfigError if no cluster answers.
    """
    host, _, port = (address or "").rpartition(":")
    try:
        if host and "/" not in host and port.isdecimal():
            # Ray itself would try for minutes.
            socket.create_connection((host, int(port)), RAY_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # Ray's have many lines
        raise ConfigError(
            f"--address {address}: no Ray cluster answers ({reason}); check the address, or start"
            " one with `ray start --head`"
        ) from None


def encode_in_ray_worker(job: PrepareJob, part: JobPart) -> PartRecord:
    """In a Ray worker: encode one part. The encoder is kept for the next part of equal settings."""
    if WORKER.get("settings") != job.settings:
        start_worker(job)
        WORKER["settings"] = job.settings
    WORKER["job"] = job
    return encode_part(job, part, WORKER["encoder"])
