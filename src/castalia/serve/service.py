"""The work behind the endpoints: requests become texts, and events become answers."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial

from starlette.requests import Request

from castalia.corpus.conversation import special_defaults
from castalia.serve.active_request import ActiveRequest, ClientLeftError, FailedError
from castalia.serve.answer_json import json_bytes
from castalia.serve.answers import AnswerFormat, server_sent
from castalia.serve.conversation import conversation_of
from castalia.serve.encoding import decoded, listed_ids, require_no_added
from castalia.serve.error_answers import error_text
from castalia.serve.lanes import Lanes
from castalia.serve.limits import error_body
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.metrics import ServerMetrics
from castalia.serve.model_pool import ModelPool, NoTemplateError
from castalia.serve.preparation import Preparation
from castalia.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from castalia.serve.scheduler import StreamEvent
from castalia.serve.template_writers import TemplateWriters

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as in OpenAI's API."""
NO_LIMIT = 2**31 - 1
"""max_tokens of a chat reply without one: the model's context ends it."""
FEW_TOKENS = 64
"""Tokens that are reported on the event loop: some milliseconds of work."""
LOG = logging.getLogger("castalia.serve")


class Service:
    """Models and metrics, and the work of every endpoint.

    What grows with a request runs in `lanes`, chat templates in processes of their own.
    """

    def __init__(self, pool: ModelPool, metrics: ServerMetrics, lanes: Lanes) -> None:
        self.pool = pool
        self.metrics = metrics
        self.lanes = lanes
        self.writers = TemplateWriters()

    def close(self) -> None:
        """Begin no more work."""
        self.pool.close()
        self.lanes.close()
        self.writers.close()

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
        asked = Preparation(
            loaded,
            body,
            body.prompts,
            max_tokens,
            answer,
            score_prompt=bool(body.echo and body.logprobs is not None),
            echo=bool(body.echo),
        )
        return await self.start(asked)

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
        conversation = conversation_of(body, special_defaults(loaded.model))
        prompt = await self.writers.write(body.weight, loaded.template, conversation)
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
        return await self.start(Preparation(loaded, body, [prompt], max_tokens, answer))

    async def tokenize(self, body: TokenizeRequest) -> bytes:
        """The answer of /tokenize, in JSON.

        Raises  ConfigError if the text has more tokens than are listed.
        """
        loaded = await self.model(body.model)
        require_no_added(loaded.model, body.add_special_tokens)
        return await self.lanes.run(body.weight, listed_ids, loaded.model, body.prompt)

    async def detokenize(self, body: DetokenizeRequest) -> bytes:
        """The answer of /detokenize, in JSON.

        Raises  ConfigError for ids outside of the vocabulary.
        """
        loaded = await self.model(body.model)

        def text() -> bytes:
            loaded.model.require_ids(body.tokens)
            return json_bytes({"prompt": decoded(loaded.model, body.tokens)})

        return await self.lanes.run(body.weight, text)

    async def model(self, name: str | None) -> LoadedModel:
        """A loaded model, which stays in memory as long as this object."""
        return await self.pool.find(name)

    async def start(self, asked: Preparation) -> ActiveRequest:
        """Encode the prompts and queue the texts of each.

        Raises  ConfigError if the model cannot serve it; QueueFullError, StoppingError.
        """
        asked.require_capacity()
        loop = asyncio.get_running_loop()
        # Prompts of chats are as long as what they were written from.
        request = await self.lanes.run(asked.body.weight, asked.prepared, loop)
        asked.loaded.scheduler.submit(request.jobs)
        self.metrics.prompt_tokens.inc(request.prompt_tokens)
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

    async def whole(self, active: ActiveRequest, http: Request) -> bytes:
        """The complete answer in JSON, once every text has ended.

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
        if active.entries <= FEW_TOKENS:
            return active.whole()
        return await self.lanes.run(active.entries, active.whole)

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
            yield server_sent(error_body(error.status, error_text(error)))
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
            entries = len(event.tokens) * ((answer.top or 0) + 1)
            work = partial(answer.event_chunk, index, text, event, reports[index])
            if len(event.tokens) <= FEW_TOKENS:
                chunk = work()
            else:
                chunk = await self.lanes.run(entries, work)
            if chunk:
                yield chunk


async def disconnected(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
