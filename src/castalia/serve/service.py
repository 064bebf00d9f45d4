"""The work behind the endpoints: requests become texts, and events become answers."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from castalia.core.errors import ConfigError
from castalia.corpus.conversation import special_defaults
from castalia.inference.language_model import LanguageModel
from castalia.inference.options import Options
from castalia.serve.answers import AnswerFormat, CollectedText, server_sent
from castalia.serve.conversation import chat_prompt
from castalia.serve.drawing import options_of
from castalia.serve.limits import error_body
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.metrics import ServerMetrics
from castalia.serve.model_pool import ModelPool, NoTemplateError
from castalia.serve.protocol import Usage
from castalia.serve.requests import ChatRequest, CompletionRequest, SamplingBody
from castalia.serve.scheduler import (
    Job,
    ServedSearch,
    ServedText,
    StreamEvent,
)
from castalia.serve.token_report import TokenReport
from castalia.tokenizers.forms import OtherTokenizer

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as in OpenAI's API."""
NO_LIMIT = 2**31 - 1
"""max_tokens of a chat reply without one: the model's context ends it."""
LOG = logging.getLogger("castalia.serve")

Inbox = asyncio.Queue[tuple[int, StreamEvent]]
"""Events of one request, each with the index of its text."""


class FailedError(Exception):
    """An exception on the scheduler's thread, as its client is told of it."""

    def __init__(self, cause: Exception) -> None:
        self.status = 500
        message = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, ConfigError):  # a form that turned out too large is the request's
            self.status = 400
            message = str(cause)
        super().__init__(message)


class ClientLeftError(Exception):
    """The client disconnected before the answer."""


@dataclass
class ActiveRequest:
    """The texts of one request and the inbox of their events."""

    loaded: LoadedModel
    texts: list[ServedText]
    jobs: list[Job]
    """The same texts, those of a beam search together."""
    answer: AnswerFormat
    echoes: list[str]
    """The prompt repeated before each text; empty without `echo`."""
    inbox: Inbox
    prompt_tokens: int
    """Tokens of all prompts, each counted once for its `n` texts, as OpenAI does."""
    drawn: int = 1
    """Texts of each prompt."""
    n: int = 1
    """Texts of each prompt that are answered, the likeliest of them."""
    received: float = field(default_factory=time.perf_counter)
    outputs: list[CollectedText] = field(init=False)
    last_event: list[float] = field(init=False)
    """Time of each text's last event, for the latency histograms."""

    def __post_init__(self) -> None:
        self.outputs = [CollectedText() for _ in self.texts]
        self.last_event = [self.received for _ in self.texts]

    def reports(self) -> list[TokenReport | None]:
        """A fresh report of each text's tokens; None without log-probabilities."""
        pairs = zip(self.texts, self.echoes, strict=True)
        return [self.answer.report(text, echo) for text, echo in pairs]

    def chosen(self) -> list[int]:
        """The texts to answer with: of `best_of` the n of the highest log-probability a token."""
        if self.drawn == self.n:
            return list(range(len(self.texts)))
        chosen: list[int] = []
        for first in range(0, len(self.texts), self.drawn):
            group = range(first, first + self.drawn)
            chosen += sorted(group, key=self.mean_logprob, reverse=True)[: self.n]
        return chosen

    def mean_logprob(self, index: int) -> float:
        """Log-probability of a text, in nats a token."""
        text = self.texts[index]
        tokens = self.outputs[index].tokens
        if text.score_prompt:
            tokens = tokens[len(text.continuation.ids) :]
        scored = [token.logprob for token in tokens if token.logprob is not None]
        # A prompt that is only scored has no text.
        return sum(scored) / max(1, len(scored))

    def usage(self) -> Usage:
        """Token counts so far."""
        collected = sum(len(output.tokens) for output in self.outputs)
        # Tokens of a scored prompt are collected too, but they are no part of the completion.
        scored = sum(len(text.continuation.ids) for text in self.texts if text.score_prompt)
        completion = collected - scored
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
        )


class Service:
    """Models and metrics, and the work of every endpoint."""

    def __init__(self, pool: ModelPool, metrics: ServerMetrics) -> None:
        self.pool = pool
        self.metrics = metrics

    async def complete(self, body: CompletionRequest) -> ActiveRequest:
        """Start a completion request.

        Raises  ConfigError if the model cannot serve it; QueueFullError, StoppingError.
        """
        loaded = await self.model(body.model)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        answer = AnswerFormat(
            loaded.model,
            loaded.name,
            chat=False,
            top=body.logprobs,
            usage_follows=body.usage_follows,
            id=body.request_id or uuid.uuid4().hex,
        )
        return await self.start(
            loaded,
            body,
            body.prompts,
            max_tokens,
            answer,
            score_prompt=bool(body.echo and body.logprobs is not None),
            echo=bool(body.echo),
        )

    async def chat(self, body: ChatRequest) -> ActiveRequest:
        """Start a chat request.

        Raises  NoTemplateError if the model has no chat template; ConfigError if the template
                rejects the conversation; QueueFullError, StoppingError.
        """
        loaded = await self.model(body.model)
        if loaded.template is None:
            raise NoTemplateError(
                f"model {loaded.name!r} has no chat template (it is a base model);"
                " use /v1/completions instead"
            )
        prompt = chat_prompt(loaded.template, body, special_defaults(loaded.model))
        max_tokens = body.max_completion_tokens or body.max_tokens or NO_LIMIT
        top = None
        if body.logprobs:
            top = body.top_logprobs or 0
        answer = AnswerFormat(
            loaded.model,
            loaded.name,
            chat=True,
            top=top,
            usage_follows=body.usage_follows,
            id=body.request_id or uuid.uuid4().hex,
        )
        return await self.start(loaded, body, [prompt], max_tokens, answer)

    async def model(self, name: str | None) -> LoadedModel:
        """A loaded model, which stays in memory as long as this object."""
        return await self.pool.find(name)

    async def start(
        self,
        loaded: LoadedModel,
        body: SamplingBody,
        prompts: list[str | list[int]],
        max_tokens: int,
        answer: AnswerFormat,
        *,
        score_prompt: bool = False,
        echo: bool = False,
    ) -> ActiveRequest:
        """Encode the prompts and queue the texts of each."""
        capacity = loaded.scheduler.most_waiting
        if len(prompts) * body.width > capacity:
            raise ConfigError(
                f"the request asks for {len(prompts) * body.width} texts, but at most {capacity}"
                " can wait; split it"
            )
        model = loaded.model
        # Long prompts take seconds to encode, and so do grammars: other requests must not wait.
        encoded = await asyncio.to_thread(
            lambda: [encode(model, prompt, body, echo) for prompt in prompts]
        )
        slots = loaded.scheduler.batcher.slots.count
        options = await asyncio.to_thread(options_of, model, body, max_tokens, slots)
        n = body.n or 1
        # A search finds its n texts itself; of several drawn ones the best are chosen at the end.
        drawn = n if options.search.num_beams > 1 else body.width
        loop = asyncio.get_running_loop()
        inbox = Inbox()
        texts: list[ServedText] = []
        jobs: list[Job] = []
        for ids, _ in encoded:
            group = []
            for index in range(len(texts), len(texts) + drawn):
                text = served_text(model, ids, max_tokens, options, index)
                text.emit = sender(loop, inbox, index)
                text.top = answer.top
                # The choice among several goes by their log-probabilities.
                if drawn > n and answer.top is None:
                    text.top = 0
                text.score_prompt = score_prompt
                group.append(text)
            texts += group
            jobs += [ServedSearch(group, options.search)] if options.search.num_beams > 1 else group
        echoes = [written for _, written in encoded for _ in range(drawn)]
        prompt_tokens = sum(len(text.continuation.ids) for text in texts[::drawn])
        request = ActiveRequest(
            loaded, texts, jobs, answer, echoes, inbox, prompt_tokens, drawn=drawn, n=n
        )
        loaded.scheduler.submit(jobs)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        return request

    async def events(self, request: ActiveRequest) -> AsyncIterator[tuple[int, StreamEvent]]:
        """All events of a request, each with the index of its text.

        Closing the iterator early cancels the rest.
        Raises  FailedError if a text fails.
        """
        unfinished = len(request.texts)
        try:
            while unfinished:
                index, event = await request.inbox.get()
                if event.error is not None:
                    failed = FailedError(event.error)
                    if failed.status == 500:
                        # Here, because a stream that has begun reaches no handler of the app.
                        LOG.error("a text failed", exc_info=event.error)
                    raise failed from event.error
                self.measure(request, index, event)
                request.outputs[index].add(event)
                if event.finish_reason is not None:
                    unfinished -= 1
                yield index, event
        finally:
            if unfinished:
                request.loaded.scheduler.cancel(request.texts)

    def measure(self, request: ActiveRequest, index: int, event: StreamEvent) -> None:
        """Record the latency and the tokens of one event."""
        now = time.perf_counter()
        is_first = not request.outputs[index].tokens
        histogram = self.metrics.each_token
        if is_first:
            histogram = self.metrics.first_token
        histogram.observe(now - request.last_event[index])
        request.last_event[index] = now
        generated = len(event.tokens)
        text = request.texts[index]
        if is_first and text.score_prompt:
            # The first event carries the scored prompt as well.
            generated -= len(text.continuation.ids)
        self.metrics.generated_tokens.inc(generated)

    async def whole(self, active: ActiveRequest, http: Request) -> dict[str, Any]:
        """The complete answer, once every text has ended.

        Raises  ClientLeftError if the client disconnects first, which cancels the texts.
        """

        async def gather() -> None:
            async for _ in self.events(active):
                pass

        work = asyncio.create_task(gather())
        gone = asyncio.create_task(disconnected(http))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            self.metrics.cancelled.inc()
            raise ClientLeftError
        gone.cancel()
        work.result()
        chosen = active.chosen()
        reports = active.reports()
        return active.answer.whole(
            [active.outputs[index] for index in chosen],
            [active.echoes[index] for index in chosen],
            [reports[index] for index in chosen],
            active.usage(),
        )

    async def chunks(self, request: ActiveRequest) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one is [DONE]."""
        ended = False
        try:
            async for chunk in self.text_chunks(request):
                yield chunk
            if request.answer.usage_follows:
                yield request.answer.usage_chunk(request.usage())
            yield "data: [DONE]\n\n"
            ended = True
        except FailedError as error:
            # The status line is sent already; an error event is all that is left to say.
            ended = True
            yield server_sent(error_body(error.status, str(error)))
        finally:
            if not ended:  # Starlette closes the iterator when the client disconnects
                request.loaded.scheduler.cancel(request.texts)
                self.metrics.cancelled.inc()

    async def text_chunks(self, request: ActiveRequest) -> AsyncIterator[str]:
        """Openings, echoes and events of a request as server-sent events."""
        answer = request.answer
        reports = request.reports()
        # The tokens of a scored prompt come with the first event, and its text with them.
        late = {
            index: echo
            for index, echo in enumerate(request.echoes)
            if request.texts[index].score_prompt
        }
        if answer.chat:
            for index in range(len(request.texts)):
                yield answer.opening(index)
        for index, echo in enumerate(request.echoes):
            if echo and index not in late:
                yield answer.chunk(index, echo)
        async for index, event in self.events(request):
            text = late.pop(index, "") + event.text
            report = reports[index]
            tokens = None
            if report is not None:
                tokens = report.take(text, event.tokens, event.finish_reason)
            # A step may end inside a character: nothing to send.
            if text or tokens or event.finish_reason is not None:
                yield answer.chunk(index, text, tokens, event.finish_reason)


def encode(
    model: LanguageModel, prompt: str | list[int], body: SamplingBody, echo: bool
) -> tuple[list[int], str]:
    """The ids of a prompt, cut to `truncate_prompt_tokens`, and its text for `echo`, else "".

    Raises  ConfigError if the tokenizer would have to add special tokens.
    """
    require_no_added(model, body.add_special_tokens)
    ids = model.encode(prompt)
    most = body.truncate_prompt_tokens or len(ids)
    is_cut = most < len(ids)
    if is_cut and body.truncation_side == "right":
        ids = ids[:most]
    elif is_cut:
        # The last tokens decide what comes next.
        ids = ids[-most:]
    if not echo:
        return ids, ""
    # A whole prompt is echoed as it was sent: a tokenizer may rewrite a text.
    if isinstance(prompt, str) and not is_cut:
        return ids, prompt
    return ids, model.decode(ids)


def require_no_added(model: LanguageModel, add_special_tokens: bool | None) -> None:
    """Raises  ConfigError if `add_special_tokens` asks for tokens that no tokenizer here adds."""
    tokenizer = model.tokenizer
    if not add_special_tokens or tokenizer is None or isinstance(tokenizer, OtherTokenizer):
        return
    if tokenizer.inner.num_special_tokens_to_add(False):
        raise ConfigError(
            "add_special_tokens: not supported by this server; write the special tokens into the"
            " prompt"
        )


def served_text(
    model: LanguageModel, ids: list[int], max_tokens: int, options: Options, index: int
) -> ServedText:
    """Text `index` of a request, which nobody hears of yet.

    OpenAI's way to score a prompt is max_tokens=0: no token is generated.
    """
    scoring = max_tokens == 0
    continuation = model.continuation(ids, max(1, max_tokens), options.ending, scoring=scoring)
    return ServedText(
        continuation=continuation,
        sampling=options.sampling.after(index),
        emit=lambda event: None,
        vocab_size=model.config.vocab_size,
        continues=not scoring,
    )


def sender(
    loop: asyncio.AbstractEventLoop, inbox: Inbox, index: int
) -> Callable[[StreamEvent], None]:
    """A callback for the scheduler's thread that puts the events of text `index` into `inbox`."""

    def emit(event: StreamEvent) -> None:
        try:
            loop.call_soon_threadsafe(inbox.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed: the server is down and nobody waits
            return

    return emit


async def disconnected(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
