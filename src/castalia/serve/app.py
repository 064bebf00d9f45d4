"""The ASGI application: endpoints, error handlers and the OpenAPI page."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from castalia import __version__
from castalia.inference.sampling import LARGEST_SEED, SMALLEST_SEED
from castalia.serve.active_request import ActiveRequest
from castalia.serve.body_reading import route_class
from castalia.serve.connections import ConnectionTable
from castalia.serve.error_answers import add_errors
from castalia.serve.fields import CHOICES, SEED, TEXTS, TOKEN
from castalia.serve.hosts import AllowedHosts
from castalia.serve.lanes import Lanes
from castalia.serve.limits import RequestLimits
from castalia.serve.metrics import RequestCounter, ServerMetrics
from castalia.serve.model_pool import ModelPool
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
    TokenizeRequest,
)
from castalia.serve.service import Service

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
        service.close()

    app = FastAPI(
        title="Castalia", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None
    )
    lanes = Lanes()
    service = Service(pool, ServerMetrics(), lanes)
    app.router.route_class = route_class(lanes)
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
        return Response(await service.whole(active, request), media_type="application/json")

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

    @app.post("/tokenize", response_model=Tokens, responses=ERRORS)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Encode a text."""
        return Response(await service.tokenize(body), media_type="application/json")

    @app.post("/detokenize", response_model=Text, responses=ERRORS)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Decode token ids."""
        return Response(await service.detokenize(body), media_type="application/json")

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
