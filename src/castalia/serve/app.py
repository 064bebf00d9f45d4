"""The endpoints."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from castalia import __version__
from castalia.core.errors import CastaliaError, ConfigError
from castalia.serve.limits import Limits, error_body
from castalia.serve.measures import Counted, Measures
from castalia.serve.pool import NoTemplateError, Pool, UnknownModelError
from castalia.serve.protocol import (
    CHOICES,
    TEXTS,
    TOKEN,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeRequest,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
)
from castalia.serve.scheduler import QueueFullError, StoppingError
from castalia.serve.service import ClientLeftError, FailedError, Running, Service

LOG = logging.getLogger("castalia.serve")
CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection; nobody reads it but the metrics."""
CODES: dict[type[CastaliaError], str] = {
    UnknownModelError: "model_not_found",
    NoTemplateError: "no_chat_template",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request is wrong; the message says what",
        401: "The API key is missing or wrong",
        404: "No such model, or it has no chat template",
        408: "The request did not arrive in time",
        413: "The request is too large",
        429: "The queue is full; Retry-After says when to ask again",
        500: "Something failed in the server",
        503: "The server is stopping",
    }.items()
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


def make_app(
    pool: Pool, *, api_key: str | None = None, most_bytes: int = 8 << 20, patience: float = 30.0
) -> FastAPI:
    """The ASGI application of a pool of models.

    `api_key` is asked for in Authorization headers; `most_bytes` is the largest request; `patience` the seconds that a
    request may take to arrive.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(
        title="Castalia", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None
    )
    service = Service(pool, Measures())
    add_completions(app, service)
    add_models(app, service)
    add_health(app, service)
    add_errors(app)
    app.add_middleware(Limits, most_bytes=most_bytes, seconds=patience, api_key=api_key)
    app.add_middleware(
        Counted, measures=service.measures
    )  # outside, so that what the limits refuse counts too
    vocab_size = pool.get(None).model.config.vocab_size
    app.openapi = described(app, vocab_size, pool.options.most_waiting)  # type: ignore[method-assign]
    return app


def add_completions(app: FastAPI, service: Service) -> None:
    """The two endpoints that make text."""

    async def answer(running: Running, request: Request, stream: bool, usage: bool) -> Response:
        if stream:
            return StreamingResponse(service.chunks(running, usage), media_type="text/event-stream")
        whole = await service.whole(running, request)
        return JSONResponse(whole.model_dump(exclude_none=running.answer.chat))

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=ERRORS | STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await answer(await service.complete(body), request, bool(body.stream), usage)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=ERRORS | STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply in a conversation, with a model that has a chat template."""
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await answer(await service.chat(body), request, bool(body.stream), usage)


def add_models(app: FastAPI, service: Service) -> None:
    """What is served, and its tokenizers."""
    pool = service.pool

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """All models that can be asked for."""
        return ModelList(
            data=[ModelCard(id=name, created=place.created) for name, place in pool.places.items()]
        )

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> ModelCard:
        """One of them."""
        if name not in pool.places:
            raise UnknownModelError(f"no model {name!r}; /v1/models lists what is served")
        return ModelCard(id=name, created=pool.places[name].created)

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Ids of a text."""
        found = (await service.model(body.model)).model
        ids = found.encode(body.prompt)
        return Tokens(
            tokens=ids, count=len(ids), max_model_len=found.config.max_position_embeddings
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Text of ids."""
        found = (await service.model(body.model)).model
        found.require_ids(body.tokens)
        return Text(prompt=found.decode(body.tokens))

    @app.get("/tokenizer_info", responses=ERRORS)
    async def tokenizer_info() -> dict[str, Any]:
        """What a client needs to know of the first model's tokenizer."""
        found = (await service.model(None)).model
        names = found.tokenizer.tokens() if found.tokenizer is not None else []
        eos = names[found.eod_id] if found.eod_id is not None else None
        return {
            "tokenizer_class": "castalia",
            "eos_token": eos,
            "bos_token": eos,
            "pad_token": eos,
            "vocab_size": found.config.vocab_size,
            "model_max_length": found.config.max_position_embeddings,
        }


def add_health(app: FastAPI, service: Service) -> None:
    """What watches the server."""
    pool, measures = service.pool, service.measures

    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        """Whether it works."""
        running, waiting = pool.counts()
        status = "stopping" if pool.stopping else "ok"
        return Health(status=status, models=list(pool.loaded), running=running, waiting=waiting)

    @app.get("/metrics", responses=ERRORS | TEXT)
    async def metrics() -> Response:
        """Prometheus."""
        running, waiting = pool.counts()
        measures.running.set(running)
        measures.waiting.set(waiting)
        page, kind = measures.page()
        return Response(page, media_type=kind)


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        message, place = explained(error)
        return JSONResponse(error_body(400, message, param=place), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        body = error_body(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(CastaliaError)
    async def ours(request: Request, error: CastaliaError) -> Response:
        code = CODES.get(type(error))
        status = 404 if code else 400 if isinstance(error, ConfigError) else 500
        return JSONResponse(error_body(status, str(error), code=code), status)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> Response:
        return JSONResponse(
            error_body(429, str(error)), 429, headers={"Retry-After": str(error.seconds)}
        )

    @app.exception_handler(StoppingError)
    async def stopping(request: Request, error: StoppingError) -> Response:
        return JSONResponse(error_body(503, str(error)), 503, headers={"Retry-After": "5"})

    @app.exception_handler(FailedError)
    async def failed(request: Request, error: FailedError) -> Response:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error.__cause__)
        return JSONResponse(error_body(500, str(error)), 500)

    @app.exception_handler(ClientLeftError)
    async def left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)


def explained(error: RequestValidationError) -> tuple[str, str | None]:
    """One sentence for a request of the wrong form, and the name of the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: character {first['loc'][-1]}, {first['ctx']['error']}", None
    places = [str(part) for part in first["loc"] if part != "body"]
    if places[:1] == ["prompt"] and len(places) > 1:
        return (
            "prompt: expected a text, a list of texts, a list of ids, or a list of lists of ids",
            "prompt",
        )
    name = ".".join(places) or None
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return f"{name or 'the request'}: {first['msg'].removeprefix('Value error, ')}{more}", name


def bound(part: Any, limits: list[tuple[str, str, int]]) -> None:
    """Lower what the page says at each description: (description, `maximum` or `maxItems`, largest value)."""
    if isinstance(part, dict):
        for description, keyword, most in limits:
            if part.get("description") == description:
                part[keyword] = min(part[keyword], most)
    for inner in (
        part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    ):
        bound(inner, limits)


def described(app: FastAPI, vocab_size: int, most_waiting: int) -> Callable[[], dict[str, Any]]:
    """The OpenAPI page, with the largest id that is a token of the first model and the most texts that can wait.

    Without 422, which no endpoint answers: a wrong request is 400, as OpenAI's is.
    """
    from fastapi.openapi.utils import get_openapi

    limits = [
        (TOKEN, "maximum", vocab_size - 1),
        (TEXTS, "maxItems", most_waiting),
        (CHOICES, "maximum", most_waiting),
    ]

    def make() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in page["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            bound(page, limits)
            app.openapi_schema = page
        return app.openapi_schema

    return make
