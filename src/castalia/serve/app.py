"""The ASGI application: endpoints, error handlers and the OpenAPI page."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from castalia import __version__
from castalia.core.errors import CastaliaError, ConfigError, nearest
from castalia.inference.sampling import LARGEST_SEED, SMALLEST_SEED
from castalia.serve.connections import ConnectionTable
from castalia.serve.fields import CHOICES, SEED, TEXTS, TOKEN, Body
from castalia.serve.forms import ResponseFormat, SchemaFormat, StructuredOutputs
from castalia.serve.hosts import AllowedHosts
from castalia.serve.limits import RequestLimits, error_body
from castalia.serve.loaded_models import ModelBusyError
from castalia.serve.metrics import RequestCounter, ServerMetrics
from castalia.serve.model_pool import ModelPool, NoTemplateError, UnknownModelError
from castalia.serve.protocol import (
    ChatAnswer,
    CompletionAnswer,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelList,
    Text,
    Tokens,
)
from castalia.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
)
from castalia.serve.scheduler import QueueFullError, StoppingError
from castalia.serve.service import (
    ActiveRequest,
    ClientLeftError,
    FailedError,
    Service,
    require_no_added,
)

REQUESTS: tuple[type[Body], ...] = (
    CompletionRequest,
    ChatRequest,
    Message,
    ResponseFormat,
    SchemaFormat,
    StreamOptions,
    StructuredOutputs,
    TokenizeRequest,
    DetokenizeRequest,
)
FIELD_NAMES = frozenset(
    field.alias or name for request in REQUESTS for name, field in request.model_fields.items()
)
"""Every name that a request may have."""
CLIENT_LEFT = 499
"""nginx's status for a closed connection; only the metrics see it."""
STOPPING_RETRY_SECONDS = "5"
"""Retry-After while the server shuts down: about as long as a restart takes."""
CODES: dict[type[CastaliaError], str] = {
    UnknownModelError: "model_not_found",
    NoTemplateError: "no_chat_template",
}
"""Errors answered with 404, and OpenAI's code for each."""
ERROR_TEXTS = {
    400: "The request is invalid; the message names the field",
    401: "The API key is missing or wrong",
    403: "Host or Origin is not a name of this server, which has no key",
    404: "Unknown model, or a model without a chat template",
    408: "The request did not arrive in time",
    413: "The request is too large",
    429: "The queue is full; Retry-After gives the seconds to wait",
    500: "Internal error",
    503: "The server is shutting down, or other models are busy; Retry-After gives the seconds",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in ERROR_TEXTS.items()
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


def make_app(
    pool: ModelPool,
    *,
    api_key: str | None = None,
    most_bytes: int = 8 << 20,
    patience: float = 30.0,
    hosts: AllowedHosts | None = None,
    connections: ConnectionTable | None = None,
) -> FastAPI:
    """The ASGI application that serves a pool of models.

    `api_key` is required in Authorization headers unless it is None. `most_bytes` limits the size
    of a request, `patience` the seconds until it has arrived. Without a key, `hosts` are the names
    that requests may be sent to (None: any). `connections` are those that /metrics reports.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(
        title="Castalia", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None
    )
    service = Service(pool, ServerMetrics())
    add_completions(app, service)
    add_models(app, service)
    add_health(app, service, connections)
    add_errors(app)
    # The middleware added last is the outermost: requests refused by the limits are counted too.
    app.add_middleware(
        RequestLimits, most_bytes=most_bytes, seconds=patience, api_key=api_key, hosts=hosts
    )
    app.add_middleware(RequestCounter, metrics=service.metrics)
    vocab_size = pool.get(None).model.config.vocab_size
    page = openapi_page(app, vocab_size, pool.options.most_waiting)
    app.openapi = page  # type: ignore[method-assign]
    return app


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the endpoints that generate text."""

    async def respond(active: ActiveRequest, request: Request, stream: bool | None) -> Response:
        if stream:
            return StreamingResponse(service.chunks(active), media_type="text/event-stream")
        return JSONResponse(await service.whole(active, request))

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=ERRORS | STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        active = await service.complete(body)
        return await respond(active, request, body.stream)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=ERRORS | STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply in a conversation; the model needs a chat template."""
        active = await service.chat(body)
        return await respond(active, request, body.stream)


def add_models(app: FastAPI, service: Service) -> None:
    """Add the endpoints about models and their tokenizers."""
    locations = service.pool.locations

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """List all models of this server."""
        cards = [
            ModelCard(id=name, created=location.created) for name, location in locations.items()
        ]
        return ModelList(data=cards)

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> ModelCard:
        """Describe one model."""
        return ModelCard(id=name, created=service.pool.location(name).created)

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Encode a text."""
        model = (await service.model(body.model)).model
        require_no_added(model, body.add_special_tokens)
        ids = model.encode(body.prompt)
        return Tokens(
            tokens=ids, count=len(ids), max_model_len=model.config.max_position_embeddings
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Text:
        """Decode token ids."""
        model = (await service.model(body.model)).model
        model.require_ids(body.tokens)
        return Text(prompt=model.decode(body.tokens))

    @app.get("/tokenizer_info", responses=ERRORS)
    async def tokenizer_info() -> dict[str, Any]:
        """Describe the first model's tokenizer."""
        model = (await service.model(None)).model
        eos = model.token_name(model.eod_id)
        return {
            "tokenizer_class": "castalia",
            "eos_token": eos,
            "bos_token": model.token_name(model.start_id),
            "pad_token": eos,
            "vocab_size": model.config.vocab_size,
            "model_max_length": model.config.max_position_embeddings,
        }


def add_health(app: FastAPI, service: Service, connections: ConnectionTable | None) -> None:
    """Add the endpoints for monitoring."""
    pool = service.pool
    metrics = service.metrics

    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        """Report the server's state."""
        running, waiting = pool.counts()
        status = "stopping" if pool.stopping else "ok"
        return Health(
            status=status,
            models=list(pool.loaded),
            loading=pool.models.loading(),
            leaving=pool.models.leaving(),
            running=running,
            waiting=waiting,
        )

    @app.get("/metrics", responses=ERRORS | TEXT)
    async def prometheus() -> Response:
        """Report metrics for Prometheus."""
        metrics.observe(pool)
        if connections is not None:
            metrics.observe_connections(connections)
        page, kind = metrics.page()
        return Response(page, media_type=kind)


def add_errors(app: FastAPI) -> None:
    """Add the handlers that turn every exception into OpenAI's error shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, field = validation_message(error)
        return JSONResponse(error_body(400, message, param=field), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        body = error_body(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(CastaliaError)
    async def castalia_error(request: Request, error: CastaliaError) -> Response:
        code = CODES.get(type(error))
        if code is not None:
            status = 404
        elif isinstance(error, ConfigError):  # the client asked for something impossible
            status = 400
        else:
            status = 500
        return JSONResponse(error_body(status, str(error), code=code), status)

    @app.exception_handler(QueueFullError)
    async def queue_full(request: Request, error: QueueFullError) -> Response:
        headers = {"Retry-After": str(error.seconds)}
        return JSONResponse(error_body(429, str(error)), 429, headers=headers)

    @app.exception_handler(ModelBusyError)
    async def model_busy(request: Request, error: ModelBusyError) -> Response:
        headers = {"Retry-After": str(error.seconds)}
        return JSONResponse(error_body(503, str(error), code="model_busy"), 503, headers=headers)

    @app.exception_handler(StoppingError)
    async def stopping(request: Request, error: StoppingError) -> Response:
        headers = {"Retry-After": STOPPING_RETRY_SECONDS}
        return JSONResponse(error_body(503, str(error)), 503, headers=headers)

    @app.exception_handler(FailedError)
    async def failed(request: Request, error: FailedError) -> Response:
        return JSONResponse(error_body(error.status, str(error)), error.status)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The server logs the traceback; clients of OpenAI's API expect JSON whatever happened.
        return JSONResponse(error_body(500, f"internal error: {type(error).__name__}"), 500)

    @app.exception_handler(ClientLeftError)
    async def client_left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)


def validation_message(error: RequestValidationError) -> tuple[str, str | None]:
    """One sentence about an invalid request, and the name of the field (None: the whole body)."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: character {first['loc'][-1]}, {first['ctx']['error']}", None
    path = [str(step) for step in first["loc"] if step != "body"]
    if path[:1] == ["prompt"] and len(path) > 1:
        # pydantic reports each of the four types that it tried; one sentence says it all.
        return (
            "prompt: expected a string, a list of strings, a list of token ids, or a list of lists"
            " of token ids",
            "prompt",
        )
    if first["type"] == "extra_forbidden":
        unknown = ".".join(path)
        if path[-1] in FIELD_NAMES:
            return f"{unknown}: not a field of this endpoint", unknown
        return f"unknown field {unknown!r}{nearest(path[-1], FIELD_NAMES)}", unknown
    places = [field_path(problem["loc"]) for problem in problems]
    name = places[0] or None
    messages = [problem["msg"].removeprefix("Value error, ") for problem in problems]
    message = f"{name or 'the request'}: {messages[0]}"
    # pydantic reports each type that it tried for one field.
    alike = [text for text, place in zip(messages, places, strict=True) if place == places[0]]
    for text in dict.fromkeys(alike[1:]):
        message += f" or {text.removeprefix('Input should be ')}"
    others = len(problems) - len(alike)
    if others:
        message += f" (and {others} more)"
    return message, name


def field_path(steps: Sequence[int | str]) -> str:
    """The path of a field, with places in lists, without pydantic's names of the types it tried."""
    path = []
    for step in steps[1:]:
        if not (isinstance(step, int) or step.isdigit() or step in FIELD_NAMES):
            break
        path.append(str(step))
    return ".".join(path)


def set_bounds(schema: Any, bounds: Iterable[tuple[str, str, int]]) -> None:
    """Set the bounds in a JSON schema, in place.

    Each bound is (description of the schema, `maximum`, `minimum` or `maxItems`, value). A bound
    of `maximum` or `maxItems` is only ever lowered.
    """
    if isinstance(schema, dict):
        for description, keyword, value in bounds:
            if schema.get("description") == description:
                if keyword != "minimum":
                    value = min(value, schema[keyword])
                schema[keyword] = value
        children = list(schema.values())
    elif isinstance(schema, list):
        children = schema
    else:
        return
    for child in children:
        set_bounds(child, bounds)


def openapi_page(app: FastAPI, vocab_size: int, most_waiting: int) -> Callable[[], dict[str, Any]]:
    """A function that builds the OpenAPI page once.

    The page states this server's own bounds: the largest token id of the first model, and the most
    texts that can wait. It lists no 422: an invalid request is answered with 400, as OpenAI does.
    """
    from fastapi.openapi.utils import get_openapi

    bounds = [
        (TOKEN, "maximum", vocab_size - 1),
        (TEXTS, "maxItems", most_waiting),
        (CHOICES, "maximum", most_waiting),
        # FastAPI writes bounds as floats, and the nearest floats lie outside of int64.
        (SEED, "minimum", SMALLEST_SEED),
        (SEED, "maximum", LARGEST_SEED),
    ]

    def make() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in page["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            set_bounds(page, bounds)
            app.openapi_schema = page
        return app.openapi_schema

    return make
