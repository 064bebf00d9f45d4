"""Where parts are worked on: in this process, in processes of this machine, or on the machines of a Ray cluster."""

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
from castalia.corpus.parts import Job, PartRecord, encode_part
from castalia.corpus.pieces import Part

AHEAD = 2
"""Parts that wait beside those that are worked on."""
LIVES = 3
"""How many times a part is given out before its workers' deaths are the job's."""
RAY_SECONDS = 10.0
"""How long a Ray cluster may take to answer."""
Done = PartRecord | None
"""The record of a part; None asks for it to be worked on."""
Results = Generator[tuple[Part, PartRecord], None, None]
Work = Iterator[tuple[Part, Done]]


def in_this_process(job: Job, work: Work) -> Results:
    """Each part when it is asked for."""
    encoder = None
    for part, record in work:
        if record is None:
            encoder = encoder or Encoder(job.tokenizer, fast=job.fast)
            record = encode_part(job, part, encoder)
        yield part, record


STATE: dict[str, Any] = {}
"""Job and encoder of this worker process, set once when it starts."""


def start_worker(job: Job) -> None:
    """In a worker: keep the job, and leave the other cores to the others."""
    leave_cores()
    keep_freed_memory()
    STATE["job"], STATE["encoder"] = job, Encoder(job.tokenizer, fast=job.fast)


def work_on(part: Part) -> PartRecord:
    """In a worker: one part."""
    return encode_part(STATE["job"], part, STATE["encoder"])


class Pool:
    """Worker processes of this machine. One that dies takes the pool with it; its parts are given out anew."""

    def __init__(self, job: Job, workers: int) -> None:
        self.job, self.workers = job, workers
        self.lives: dict[int, int] = {}
        self.waiting: deque[tuple[Part, Done, Future[PartRecord] | None]] = deque()
        self.start()

    def start(self) -> None:
        """New processes."""
        self.pool = WorkerPool(self.workers, start_worker, self.job)

    def run(self, work: Work) -> Results:
        """The parts in order; few wait at a time, so memory stays bounded."""
        try:
            while True:
                while (
                    len(self.waiting) < self.workers + AHEAD
                    and (given := next(work, None)) is not None
                ):
                    part, record = given
                    self.waiting.append(
                        (part, record, self.submit(part) if record is None else None)
                    )
                if not self.waiting:
                    return
                yield self.next()
        finally:  # workers that have nothing left to do end by themselves
            self.pool.shutdown(wait=bool(self.waiting), cancel_futures=True)

    def submit(self, part: Part) -> Future[PartRecord]:
        """Give a part out."""
        self.lives[part.number] = self.lives.get(part.number, 0) + 1
        if self.lives[part.number] > LIVES:
            raise CastaliaError(
                f"{part.pieces[0].where}: the process that worked on it died {LIVES} times, most likely of too little"
                " memory; take fewer --workers"
            )
        try:
            return self.pool.submit(work_on, part)
        except BrokenProcessPool as error:
            broken: Future[PartRecord] = Future()
            broken.set_exception(error)
            return broken

    def next(self) -> tuple[Part, PartRecord]:
        """The oldest part, done."""
        while True:
            part, record, future = self.waiting[0]
            try:
                found = future.result() if future is not None else record
            except BrokenProcessPool:
                self.renew()
                continue
            self.waiting.popleft()
            assert found is not None
            return part, found

    def renew(self) -> None:
        """New processes for the parts that were lost."""
        self.pool.shutdown(cancel_futures=True)
        if (why := self.pool.why_none_began) is not None:
            raise CastaliaError(why)
        self.start()
        for i, (part, record, future) in enumerate(self.waiting):
            if future is not None and (
                not future.done() or future.cancelled() or future.exception() is not None
            ):
                self.waiting[i] = (part, record, self.submit(part))


def run_parts(job: Job, work: Work, workers: int, engine: str, address: str | None) -> Results:
    """Every part with its record, in order.

    Raises  CastaliaError of a worker; ConfigError about an unknown engine.
    """
    if engine == "ray":
        return on_ray(job, work, workers, address)
    if engine != "local":
        raise ConfigError(f"no engine {engine!r}; have: local, ray")
    return Pool(job, workers).run(work) if workers > 1 else in_this_process(job, work)


def on_ray(job: Job, work: Work, workers: int, address: str | None) -> Results:
    """Parts as tasks of a Ray cluster, whose machines see the work folder; tasks that die are retried by Ray.

    Raises  ConfigError if ray is not installed; CastaliaError if a part's workers die again and again.
    """
    ray = require("ray", "ray", "--engine ray")
    started = not ray.is_initialized()
    if started:
        join_cluster(ray, address)
    task = ray.remote(num_cpus=1, max_retries=LIVES, max_calls=0)(ray_part)
    held = ray.put(job)
    waiting: deque[tuple[Part, Any]] = deque()
    try:
        while True:
            while len(waiting) < workers + AHEAD and (found := next(work, None)) is not None:
                part, record = found
                waiting.append((part, record if record is not None else task.remote(held, part)))
            if not waiting:
                return
            part, record = waiting.popleft()
            try:
                yield part, record if isinstance(record, PartRecord) else ray.get(record)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                ours = (
                    cause
                    if isinstance(cause, CastaliaError)
                    else CastaliaError(f"a Ray task failed: {cause}")
                )
                raise ours from None
            except ray.exceptions.RayError as error:
                raise CastaliaError(
                    f"{part.pieces[0].where}: lost on the Ray cluster: {error}"
                ) from None
    finally:
        if started:
            ray.shutdown()


def join_cluster(ray: Any, address: str | None) -> None:
    """Begin with a Ray cluster, or a new one on this machine without an address.

    Raises  ConfigError if none answers there.
    """
    host, _, port = (address or "").rpartition(":")
    try:
        if host and "/" not in host and port.isdecimal():  # ray itself would wait for minutes
            socket.create_connection((host, int(port)), RAY_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:  # ray's own words have many lines
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({reason})") from None


def ray_part(job: Job, part: Part) -> PartRecord:
    """In a Ray worker: one part; the encoder stays for the next one."""
    if STATE.get("settings") != job.settings:
        start_worker(job)
        STATE["settings"] = job.settings
    STATE["job"] = job
    return encode_part(job, part, STATE["encoder"])
