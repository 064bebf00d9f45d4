"""The scheduler: one thread owns a model and generates many texts at once.

Texts wait in a bounded queue, enter a slot of the batch, advance one token a step, and free their
slot when they end. All calls into the engine come from this thread, so the engine needs no locks.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from castalia.inference.batching import Admission, Batcher
from castalia.inference.beams import BeamSearch, Search
from castalia.inference.decoding import Continuation, FinishReason
from castalia.inference.engine import Engine
from castalia.inference.sampling import Sampling
from castalia.serve.scored_tokens import ScoredToken, SharedScores, score

PREFILL_TOKENS = 2048
"""Most prompt tokens read in one step. Running texts stand still meanwhile, so this bounds the
pause between two of their tokens. One prompt is always admitted, however long."""
AVERAGE_WEIGHT = 0.1
"""Weight of the newest text in the moving average of durations: about the last ten count."""


class QueueFullError(Exception):
    """The queue is full; retry after `seconds`."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(
            f"the queue is full: {waiting} texts are waiting already; retry after {seconds} s"
        )
        self.seconds = seconds


class StoppingError(Exception):
    """The server is shutting down."""


@dataclass(frozen=True)
class StreamEvent:
    """The output of one step for one text: new text and tokens.

    The last event carries `finish_reason`, or the `error` that ended the text. `text` holds whole
    characters only, and nothing that a stop string may still cut.
    """

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(eq=False)
class ServedText:
    """One text of a request, waiting or running. `emit` is called on the scheduler's thread."""

    continuation: Continuation
    sampling: Sampling
    emit: Callable[[StreamEvent], None]
    vocab_size: int
    top: int | None = None
    """Number of likeliest tokens reported at each position; None omits log-probabilities."""
    score_prompt: bool = False
    continues: bool = True
    """False scores the prompt and generates nothing."""
    cancelled: bool = False
    pending: list[ScoredToken] = field(default_factory=list)
    """Tokens not emitted yet."""
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def texts(self) -> list["ServedText"]:
        """The text itself, as of a job of several."""
        return [self]

    @property
    def slots(self) -> int:
        """Slots that it takes."""
        return 1

    def record(self, logits: Tensor, token: int) -> None:
        """Keep a token drawn from logits (V,) for the next event."""
        self.pending.append(self.scored(logits, token))

    def scored(self, logits: Tensor, token: int) -> ScoredToken:
        """A token drawn from logits (V,), with its log-probability if it is asked for."""
        if self.top is None:
            return ScoredToken(token, None, [])
        (scored,) = score(logits[None], [token], self.top, self.vocab_size)
        return scored

    def score_part(self, scores: SharedScores, logits: Tensor, start: int) -> None:
        """Keep the tokens of the prompt that logits (n, V) after its tokens from `start` on
        predict."""
        ids = self.continuation.ids
        if start == 0:
            # Nothing precedes the first token.
            self.pending.append(ScoredToken(ids[0], None, []))
        # The logits after the last token score no token of the prompt.
        tokens = ids[start + 1 : start + 1 + len(logits)]
        if tokens and self.top is not None:
            self.pending += scores.score(logits, tokens, self.top, self.vocab_size)

    def emit_pending(self, text: str) -> None:
        """Emit `text` and the tokens drawn since the last event."""
        tokens = self.pending
        self.pending = []
        self.emit(StreamEvent(text, tokens, self.continuation.finish_reason))


@dataclass(eq=False)
class ServedSearch:
    """A beam search, waiting or running; `texts` are the places of its answers, best first."""

    texts: list[ServedText]
    options: Search
    search: BeamSearch | None = None
    """None while it waits."""

    @property
    def continuation(self) -> Continuation:
        """The prompt."""
        return self.texts[0].continuation

    @property
    def cancelled(self) -> bool:
        """Whether the client is gone."""
        return any(text.cancelled for text in self.texts)

    @property
    def slots(self) -> int:
        """Slots that it takes."""
        return self.options.num_beams

    def begin(self, device: torch.device) -> BeamSearch:
        """The search itself, which begins now."""
        first = self.texts[0]
        (generator,) = first.sampling.generators(1, device)
        self.search = BeamSearch(
            first.continuation, first.sampling, self.options, generator, first.scored
        )
        return self.search

    def deliver(self) -> None:
        """Emit the answers of a search that is done.

        Raises  the error of the search; ConfigError if there are fewer answers than places.
        """
        assert self.search is not None
        for text, beam in zip(self.texts, self.search.answers(), strict=True):
            text.continuation = beam.text
            text.pending += beam.watched
            text.emit_pending("".join(beam.text.pieces))


Job = ServedText | ServedSearch
"""What waits in the queue."""


class Scheduler:
    """Generates at most `slots` texts of at most `length` tokens at a time on one engine.

    Up to `most_waiting` more texts wait in the queue.
    """

    def __init__(self, engine: Engine, *, slots: int, length: int, most_waiting: int) -> None:
        self.engine = engine
        self.most_waiting = most_waiting
        self.batcher = Batcher(engine, slots, length)
        self.waiting: deque[Job] = deque()
        self.running: dict[int, ServedText] = {}
        """Running texts by slot."""
        self.searching: list[ServedSearch] = []
        """Running searches."""
        self.changed = threading.Condition()
        self.closing = False
        self.admitting = False
        """Whether jobs are between the queue and their slots."""
        self.seconds_per_text = 1.0
        """Moving average of a text's duration, waiting included; for Retry-After."""
        self.thread = threading.Thread(target=self.work, name="castalia-scheduler", daemon=True)
        self.thread.start()

    @property
    def texts(self) -> int:
        """Texts that are being generated."""
        return len(self.running) + sum(len(job.texts) for job in self.searching)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the texts and searches of one request, all or none.

        Raises  QueueFullError, StoppingError.
        """
        with self.changed:
            if self.closing:
                raise StoppingError("the server is shutting down; retry when it is back")
            # An empty queue takes any request: one that exceeds the limit would never be served.
            if self.waiting and len(self.waiting) + len(jobs) > self.most_waiting:
                rounds = len(self.waiting) / self.batcher.slots.count
                seconds = max(1, round(rounds * self.seconds_per_text))
                raise QueueFullError(len(self.waiting), seconds)
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, texts: Iterable[ServedText]) -> None:
        """Drop texts whose client disconnected; running ones leave before the next step."""
        with self.changed:
            for text in texts:
                text.cancelled = True
            self.changed.notify()

    @property
    def is_idle(self) -> bool:
        """Whether it has no texts."""
        with self.changed:
            return not (self.running or self.searching or self.waiting or self.admitting)

    def close(self, wait: bool = True) -> None:
        """Accept no more texts; the thread ends when those it has are done."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if wait:
            self.thread.join()

    def work(self) -> None:
        """The thread's loop: admit waiting jobs, then advance all running ones by one token."""
        while (admitted := self.take()) is not None:
            for job in admitted:
                if not self.scores_in_slots(job):
                    self.isolate([job], partial(self.score_prompt, job))
            # Jobs that only wanted their prompt scored may be finished by now, and need no slot.
            unfinished = [job for job in admitted if job.continuation.finish_reason is None]
            texts = [job for job in unfinished if isinstance(job, ServedText)]
            searches = [job for job in unfinished if isinstance(job, ServedSearch)]
            if texts:
                self.isolate(texts, partial(self.admit, texts))
            if searches:
                self.isolate(searches, partial(self.admit_searches, searches))
            if self.running or self.searching:
                self.isolate([*self.running.values(), *self.searching], self.step)

    def take(self) -> list[Job] | None:
        """The jobs to admit now; blocks while idle. None once closed and drained."""
        with self.changed:
            self.admitting = False
            while True:
                self.drop_cancelled()
                if self.running or self.searching or self.waiting:
                    self.admitting = True
                    return self.choose()
                if self.closing:
                    return None
                self.changed.wait()

    def drop_cancelled(self) -> None:
        """Remove cancelled jobs from slots and queue."""
        running: list[Job] = [*self.running.values(), *self.searching]
        self.abandon([job for job in running if job.cancelled])
        self.waiting = deque(job for job in self.waiting if not job.cancelled)

    def choose(self) -> list[Job]:
        """Jobs from the head of the queue that fit free slots and PREFILL_TOKENS."""
        chosen: list[Job] = []
        tokens = 0
        free = self.batcher.free
        # In order: a search that waits for slots is not overtaken for ever by single texts.
        while self.waiting and self.waiting[0].slots <= free:
            tokens += len(self.waiting[0].continuation.ids)
            if chosen and tokens > PREFILL_TOKENS:
                break
            free -= self.waiting[0].slots
            chosen.append(self.waiting.popleft())
        return chosen

    def isolate(self, jobs: Sequence[Job], action: Callable[[], None]) -> None:
        """Run `action`; an exception ends its own jobs and no others.

        The thread must survive, else every later request would wait forever.
        """
        try:
            action()
        except Exception as error:
            self.abandon(jobs)
            for job in jobs:
                self.fail(job, error)

    def fail(self, job: Job, error: Exception) -> None:
        """End the texts of a job with an error."""
        for text in job.texts:
            text.continuation.finish_reason = text.continuation.finish_reason or "length"
            text.emit(StreamEvent(error=error))

    def abandon(self, jobs: Sequence[Job]) -> None:
        """Free the slots of jobs that failed or were cancelled."""
        failed = {id(job.continuation) for job in jobs}
        slots = [
            slot for slot, running in self.batcher.running.items() if id(running.text) in failed
        ]
        for slot in slots:
            self.batcher.evict(slot)
            self.running.pop(slot, None)
        for search in list(self.batcher.searches):
            if id(search.text) in failed:
                self.batcher.drop_search(search)
        self.searching = [job for job in self.searching if job not in jobs]

    def scores_in_slots(self, job: Job) -> bool:
        """Whether the prompt is scored where it is read, together with others."""
        is_scored = isinstance(job, ServedText) and job.score_prompt
        return is_scored and self.batcher.slots.scores_prompts

    def score_prompt(self, job: Job) -> None:
        """Score the prompt if requested; finish a text that generates nothing."""
        first = job.texts[0]
        if first.score_prompt:
            for logits, start in self.prompt_logits(first):
                first.score_part(SharedScores(), logits, start)
            for text in job.texts[1:]:
                text.pending += first.pending
        if not first.continues:
            first.continuation.finish_reason = "length"
            first.emit_pending("")

    def admit(self, texts: list[ServedText]) -> None:
        """Read the prompts of `texts` into free slots, in one pass of the engine."""
        admissions = []
        scores = SharedScores()
        for text in texts:
            (generator,) = text.sampling.generators(1, self.engine.device)
            # The batcher draws texts of equal sampling together. The seed is in the generator
            # already; left in the sampling it would put every text into a group of its own.
            sampling = replace(text.sampling, seed=None)
            admission = Admission(text.continuation, sampling, generator, text.record)
            if self.scores_in_slots(text):
                admission.continues = text.continues
                admission.score = partial(text.score_part, scores)
            admissions.append(admission)
        outputs = self.batcher.admit(admissions)
        slot_of_text = {id(running.text): slot for slot, running in self.batcher.running.items()}
        for text, output, admission in zip(texts, outputs, admissions, strict=True):
            slot = slot_of_text.get(id(text.continuation))
            if slot is not None:  # otherwise its first token ended it
                self.running[slot] = text
            self.deliver(text, output, admission.error)

    def admit_searches(self, jobs: list[ServedSearch]) -> None:
        """Read the prompts of searches into free slots, in one pass of the engine."""
        self.batcher.admit_searches([job.begin(self.engine.device) for job in jobs])
        self.searching += jobs
        self.deliver_searches()

    def step(self) -> None:
        """Draw one more token for every running text and beam."""
        # A copy: the batcher forgets the texts that end in this step, and their errors with them.
        admissions = dict(self.batcher.running)
        for slot, output in self.batcher.step().items():
            self.deliver(self.running[slot], output, admissions[slot].error)
            if slot not in self.batcher.running:
                del self.running[slot]
        self.deliver_searches()

    def deliver_searches(self) -> None:
        """Emit the answers of the searches that are done, or their errors."""
        for job in list(self.searching):
            if job.search is None or not job.search.done:
                continue
            self.searching.remove(job)
            try:
                job.deliver()
            except Exception as error:  # of this search, the other jobs go on
                self.fail(job, error)
            else:
                self.average(job.texts[0])

    def deliver(self, text: ServedText, output: str, error: Exception | None) -> None:
        """Emit a step's output, or its error, and average the duration of finished texts."""
        if error is not None:
            text.emit(StreamEvent(error=error))
            return
        text.emit_pending(output)
        if text.continuation.finish_reason is not None:
            self.average(text)

    def average(self, text: ServedText) -> None:
        """Count a finished text in the average of durations."""
        duration = time.perf_counter() - text.submitted
        self.seconds_per_text += AVERAGE_WEIGHT * (duration - self.seconds_per_text)

    def prompt_logits(self, text: ServedText) -> Iterator[tuple[Tensor, int]]:
        """Logits after the tokens of a prompt, in parts, with the place of the first of each."""
        start = 0
        for logits in self.engine.logits_in_parts(text.continuation.ids):
            yield logits, start
            start += len(logits)
