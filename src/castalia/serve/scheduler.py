"""One thread that owns a model: requests wait in a bounded queue, share its steps, and leave when they end."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from castalia.inference.batching import Admission, Batcher
from castalia.inference.decoding import FinishReason, Row
from castalia.inference.engine import Engine
from castalia.inference.sampling import Sampling

PREFILL_TOKENS = 2048
"""Prompts that are read in one step hold no more tokens together (one prompt always fits), so that running texts are
not kept waiting longer than that takes."""


class QueueFullError(Exception):
    """The queue is full; `seconds` is when to ask again."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.seconds = seconds


class StoppingError(Exception):
    """The server is going down."""


@dataclass(frozen=True)
class Scored:
    """One token, its log-probability in nats (None for the first of a text) and the likeliest at its place."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Event:
    """What a step gave one job: certain text, tokens, and at the end why it ended, or what went wrong."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """One text to be continued. `emit` is called from the scheduler's thread."""

    row: Row
    sampling: Sampling
    emit: Callable[[Event], None]
    vocab_size: int
    top: int | None = None
    """Likeliest tokens to tell with each token; None tells no log-probabilities."""
    score_prompt: bool = False
    continues: bool = True
    """False scores the prompt only."""
    cancelled: bool = False
    drawn: list[Scored] = field(default_factory=list)
    asked: float = field(default_factory=time.perf_counter)

    def watch(self, logits: Tensor, token: int) -> None:
        """Take note of a token that was drawn from logits (V,)."""
        if self.top is None:
            self.drawn.append(Scored(token, None, []))
        else:
            self.drawn += score(logits[None], [token], self.top, self.vocab_size)

    def tell(self, text: str) -> None:
        """Send what came since the last event."""
        tokens, self.drawn = self.drawn, []
        self.emit(Event(text, tokens, self.row.finish_reason))


def score(logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int) -> list[Scored]:
    """Log-probabilities of tokens (T) and the `top` likeliest at each place, out of logits (T, V).

    The softmax is over all of V, as in training; only the first vocab_size are tokens.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs[:, :vocab_size].topk(min(top, vocab_size))
    picked = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    rows = zip(tokens, picked, values.tolist(), ids.tolist(), strict=True)
    return [
        Scored(token, value, list(zip(best_ids, best, strict=True)))
        for token, value, best, best_ids in rows
    ]


class Scheduler:
    """`slots` texts of at most `length` tokens at a time on one engine, `most_waiting` more in the queue."""

    def __init__(self, engine: Engine, *, slots: int, length: int, most_waiting: int) -> None:
        self.engine, self.most_waiting = engine, most_waiting
        self.batcher = Batcher(engine, slots, length)
        self.waiting: deque[Job] = deque()
        self.jobs: dict[int, Job] = {}
        """By the slot where they run."""
        self.changed = threading.Condition()
        self.closing = False
        self.seconds_a_job = 1.0
        """Moving average, for Retry-After."""
        self.thread = threading.Thread(target=self.work, name="castalia-scheduler", daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Put the jobs of one request into the queue, all or none.

        Raises  QueueFullError, StoppingError.
        """
        with self.changed:
            if self.closing:
                raise StoppingError("the server is stopping; ask again when it is back")
            if self.waiting and len(self.waiting) + len(jobs) > self.most_waiting:
                rounds = len(self.waiting) / self.batcher.slots.count
                raise QueueFullError(len(self.waiting), max(1, round(rounds * self.seconds_a_job)))
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Forget jobs whose client is gone; those that run leave before the next step."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    def close(self, wait: bool = True) -> None:
        """Take no more jobs; the thread ends when those it has are done."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if wait:
            self.thread.join()

    def work(self) -> None:
        """The thread."""
        while (admitted := self.take()) is not None:
            for job in admitted:
                self.guard([job], partial(self.score_prompt, job))
            if new := [job for job in admitted if job.row.finish_reason is None]:
                self.guard(new, partial(self.admit, new))
            if self.jobs:
                self.guard(list(self.jobs.values()), self.step)

    def take(self) -> list[Job] | None:
        """Jobs that enter now; waits while there is nothing to do. None when closed and everything is done."""
        with self.changed:
            while True:
                self.drop_cancelled()
                if self.jobs or self.waiting:
                    return self.choose()
                if self.closing:
                    return None
                self.changed.wait()

    def drop_cancelled(self) -> None:
        """Empty the slots and the queue of jobs that nobody waits for."""
        for slot in [slot for slot, job in self.jobs.items() if job.cancelled]:
            self.batcher.evict(slot)
            del self.jobs[slot]
        self.waiting = deque(job for job in self.waiting if not job.cancelled)

    def choose(self) -> list[Job]:
        """The jobs at the head of the queue that there is room for."""
        chosen: list[Job] = []
        tokens = 0
        while self.waiting and len(chosen) < self.batcher.free:
            tokens += len(self.waiting[0].row.ids)
            if chosen and tokens > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def guard(self, jobs: list[Job], action: Callable[[], None]) -> None:
        """Run `action`; what goes wrong in it ends its jobs and no others."""
        try:
            action()
        except Exception as error:  # the thread must live on for the other jobs
            rows = {id(job.row) for job in jobs}
            for slot in [
                slot for slot, running in self.batcher.running.items() if id(running.row) in rows
            ]:
                del self.batcher.running[slot]
                self.jobs.pop(slot, None)
            for job in jobs:
                job.row.finish_reason = job.row.finish_reason or "length"
                job.emit(Event(error=error))

    def score_prompt(self, job: Job) -> None:
        """Score the prompt if that is asked; a job that asks for nothing else is done."""
        if job.score_prompt:
            job.drawn += self.scored_prompt(job)
        if not job.continues:
            job.row.finish_reason = "length"
            job.tell("")

    def admit(self, jobs: list[Job]) -> None:
        """Read the prompts of jobs into slots, in one pass."""
        new = []
        for job in jobs:
            # Without the seed, rows that are drawn alike are drawn together.
            (generator,) = job.sampling.generators(1, self.engine.device)
            new.append(Admission(job.row, replace(job.sampling, seed=None), generator, job.watch))
        texts = self.batcher.admit(new)
        places = {id(running.row): slot for slot, running in self.batcher.running.items()}
        for job, text in zip(jobs, texts, strict=True):
            if id(job.row) in places:
                self.jobs[places[id(job.row)]] = job
            self.told(job, text)

    def step(self) -> None:
        """One more token for every running job."""
        for slot, text in self.batcher.step().items():
            self.told(self.jobs[slot], text)
            if slot not in self.batcher.running:
                del self.jobs[slot]

    def told(self, job: Job, text: str) -> None:
        """Tell a job what it got, and take note of how long whole jobs take."""
        job.tell(text)
        if job.row.finish_reason is not None:
            self.seconds_a_job += 0.1 * (time.perf_counter() - job.asked - self.seconds_a_job)

    def scored_prompt(self, job: Job) -> list[Scored]:
        """Each token of the prompt with its log-probability."""
        first, *rest = job.row.ids
        scored = [Scored(first, None, [])]
        if job.top is None:
            return scored + [Scored(token, None, []) for token in rest]
        logits = self.engine.logits(job.row.ids)[:-1] if rest else None
        if logits is not None:
            for at, part in parts_of(logits):
                scored += score(part, rest[at : at + len(part)], job.top, job.vocab_size)
        return scored


def parts_of(logits: Tensor, rows: int = 256) -> Iterable[tuple[int, Tensor]]:
    """Logits (T, V) in parts of some rows, with the place where each begins."""
    return ((at, logits[at : at + rows]) for at in range(0, len(logits), rows))
