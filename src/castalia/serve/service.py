"""What the endpoints do: requests to jobs, events to answers, and jobs forgotten when their client leaves."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from castalia.core.errors import ConfigError
from castalia.inference.language_model import LanguageModel
from castalia.inference.sampling import Sampling
from castalia.serve.answers import Answer, Made, sse
from castalia.serve.limits import error_body
from castalia.serve.measures import Measures
from castalia.serve.pool import Loaded, NoTemplateError, Pool
from castalia.serve.protocol import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Drawn,
    Usage,
)
from castalia.serve.scheduler import Event, Job, StoppingError

ALL_THERE_IS = 2**31 - 1
"""A chat reply without a limit ends at the model's."""


class FailedError(Exception):
    """Something went wrong in the model's thread; the cause is attached."""


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Running:
    """The jobs of one request and where their events arrive."""

    loaded: Loaded
    jobs: list[Job]
    answer: Answer
    echoes: list[str]
    inbox: asyncio.Queue[tuple[int, Event]]
    prompt_tokens: int
    asked: float = field(default_factory=time.perf_counter)
    made: list[Made] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def usage(self) -> Usage:
        """Token counts so far."""
        told = sum(len(made.tokens) for made in self.made)
        scored = sum(len(job.row.ids) for job in self.jobs if job.score_prompt)
        completion = told - scored
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
        )


class Service:
    """The models and the numbers, and the work of every endpoint."""

    def __init__(self, pool: Pool, measures: Measures) -> None:
        self.pool, self.measures = pool, measures

    async def complete(self, body: CompletionRequest) -> Running:
        """Start the jobs of a completion request.

        Raises  ConfigError on what the model cannot do; QueueFullError, StoppingError.
        """
        loaded = await self.model(body.model)
        most = 16 if body.max_tokens is None else body.max_tokens
        prompts = [prompt for prompt in body.prompts for _ in range(body.n or 1)]
        answer = Answer(loaded.model, loaded.name, chat=False, top=body.logprobs)
        score_prompt = bool(body.echo and body.logprobs is not None)
        return await self.start(
            loaded, body, prompts, most, answer, score_prompt=score_prompt, echo=bool(body.echo)
        )

    async def chat(self, body: ChatRequest) -> Running:
        """Start the jobs of a chat request.

        Raises  ConfigError also if the model has no chat template.
        """
        loaded = await self.model(body.model)
        if loaded.template is None:
            raise NoTemplateError(
                f"{loaded.name} has no chat template: it is a base model; use /v1/completions"
            )
        eod_id, tokenizer = loaded.model.eod_id, loaded.model.tokenizer
        eos = "" if eod_id is None or tokenizer is None else tokenizer.tokens()[eod_id]
        messages = [message.model_dump() for message in body.messages]
        prompt = loaded.template.render(messages, reply=True, eos_token=eos, bos_token=eos)
        most = body.max_completion_tokens or body.max_tokens or ALL_THERE_IS
        answer = Answer(
            loaded.model,
            loaded.name,
            chat=True,
            top=(body.top_logprobs or 0) if body.logprobs else None,
        )
        prompts: list[str | list[int]] = [prompt] * (body.n or 1)
        return await self.start(loaded, body, prompts, most, answer)

    async def model(self, name: str | None) -> Loaded:
        """A model, loaded beside the event loop if need be."""
        return await asyncio.to_thread(self.pool.get, name)

    async def start(
        self,
        loaded: Loaded,
        body: Drawn,
        prompts: list[str | list[int]],
        most: int,
        answer: Answer,
        *,
        score_prompt: bool = False,
        echo: bool = False,
    ) -> Running:
        """Make the jobs and put them into the queue."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        model = loaded.model
        seed = secrets.randbits(48) if body.seed is None else body.seed
        if len(prompts) > loaded.scheduler.most_waiting:
            raise ConfigError(
                f"{len(prompts)} texts in one request; at most {loaded.scheduler.most_waiting} can wait"
            )
        # Long texts take seconds; the other requests do not wait for them.
        encoded = await asyncio.to_thread(
            lambda: [model.encode(prompt) for prompt in prompts[:: body.n or 1]]
        )
        jobs, counted = [], 0
        for index in range(len(prompts)):
            row = model.row(encoded[index // (body.n or 1)], max(1, most), body.stops)
            if body.ignore_eos:
                row.eod_id = None
            counted += len(row.ids) if index % (body.n or 1) == 0 else 0
            sampling = Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=body.top_k or 0,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=seed + index,
            )
            emit = sender(loop, inbox, index)
            size = model.config.vocab_size
            jobs.append(
                Job(row, sampling, emit, size, answer.top, score_prompt, continues=most > 0)
            )
        echoes = [prompt_text(model, prompt) if echo else "" for prompt in prompts]
        running = Running(loaded, jobs, answer, echoes, inbox, counted)
        running.made = [Made() for _ in jobs]
        running.last = [running.asked for _ in jobs]
        await self.submit(running)
        self.measures.prompt_tokens.inc(counted)
        return running

    async def submit(self, running: Running) -> None:
        """Into the queue of the model, which is loaded again if it made room for another in between."""
        try:
            running.loaded.scheduler.submit(running.jobs)
        except StoppingError:
            if self.pool.stopping:
                raise
            running.loaded = await self.model(running.loaded.name)
            running.loaded.scheduler.submit(running.jobs)

    async def events(self, running: Running) -> AsyncIterator[tuple[int, Event]]:
        """All events of a request; leaving early cancels what is left of it."""
        left = len(running.jobs)
        try:
            while left:
                index, event = await running.inbox.get()
                if event.error is not None:
                    raise FailedError(
                        f"{type(event.error).__name__}: {event.error}"
                    ) from event.error
                self.measure(running, index, event)
                running.made[index].add(event)
                left -= event.finish_reason is not None
                yield index, event
        finally:
            if left:
                running.loaded.scheduler.cancel(running.jobs)

    def measure(self, running: Running, index: int, event: Event) -> None:
        """Count what arrived."""
        now = time.perf_counter()
        first = not running.made[index].tokens
        (self.measures.first_token if first else self.measures.each_token).observe(
            now - running.last[index]
        )
        running.last[index] = now
        job = running.jobs[index]
        scored = len(job.row.ids) if first and job.score_prompt else 0
        self.measures.made_tokens.inc(len(event.tokens) - scored)

    async def whole(self, running: Running, request: Request) -> CompletionAnswer | ChatAnswer:
        """The answer when all is there.

        Raises  ClientLeftError if the client closes the connection before; its jobs are cancelled then.
        """

        async def gather() -> None:
            async for _ in self.events(running):
                pass

        work, gone = asyncio.create_task(gather()), asyncio.create_task(leaving(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            self.measures.cancelled.inc()
            raise ClientLeftError
        gone.cancel()
        work.result()
        return running.answer.whole(running.made, running.echoes, running.usage())

    async def chunks(self, running: Running, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; the last says [DONE]."""
        offsets, done = [0] * len(running.jobs), False
        try:
            if running.answer.chat:
                for index in range(len(running.jobs)):
                    yield running.answer.opening(index)
            for index, echo in enumerate(running.echoes):
                if echo:
                    yield running.answer.chunk(index, Event(echo), 0)
                    offsets[index] = 0 if running.jobs[index].score_prompt else len(echo)
            async for index, event in self.events(running):
                if event.text or event.finish_reason is not None or running.answer.top is not None:
                    yield running.answer.chunk(index, event, offsets[index])
                    offsets[index] = max(offsets[index], len(running.echoes[index])) + len(
                        event.text
                    )
            if include_usage:
                yield running.answer.usage_chunk(running.usage())
            yield "data: [DONE]\n\n"
            done = True
        except FailedError as error:
            done = True
            yield sse(error_body(500, str(error)))
        finally:
            if not done:
                running.loaded.scheduler.cancel(running.jobs)
                self.measures.cancelled.inc()


def sender(
    loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[tuple[int, Event]], index: int
) -> Callable[[Event], None]:
    """How the scheduler's thread hands job number `index`'s events to the event loop."""

    def emit(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed: the server has gone down and nobody waits
            return

    return emit


async def leaving(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def prompt_text(model: LanguageModel, prompt: str | list[int]) -> str:
    """The prompt as text, to be repeated before its continuation."""
    return prompt if isinstance(prompt, str) else model.decode(prompt)
