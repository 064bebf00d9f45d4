"""Every error as an answer in OpenAI's shape."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from castalia.core.errors import MOST_QUOTED, CastaliaError, ConfigError
from castalia.serve.active_request import ClientLeftError, FailedError
from castalia.serve.body_reading import InvalidRequestError, validation_message
from castalia.serve.limits import error_body
from castalia.serve.loaded_models import ModelBusyError
from castalia.serve.model_pool import NoTemplateError, UnknownModelError
from castalia.serve.scheduler import QueueFullError, StoppingError

CLIENT_LEFT = 499
"""nginx's status for a closed connection; only the metrics see it."""
STOPPING_RETRY_SECONDS = "5"
"""Retry-After while the server shuts down: about as long as a restart takes."""
CODES: dict[type[CastaliaError], str] = {
    UnknownModelError: "model_not_found",
    NoTemplateError: "no_chat_template",
}
"""Errors answered with 404, and OpenAI's code for each."""
MOST_MESSAGE = 500
"""Characters of a message: templates and libraries may repeat what they were given."""


def error_text(error: Exception) -> str:
    """The message of an error, cut."""
    text = str(error)
    if len(text) <= MOST_MESSAGE:
        return text
    return f"{text[:MOST_MESSAGE]}… ({len(text):,} characters)"


def add_errors(app: FastAPI) -> None:
    """Add the handlers that turn every exception into OpenAI's error shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # Of a path or a query; bodies are read by `BodyRoute`.
        message, field = validation_message(error.errors())
        return JSONResponse(error_body(400, message, param=field), 400)

    @app.exception_handler(InvalidRequestError)
    async def invalid_body(request: Request, error: InvalidRequestError) -> Response:
        return JSONResponse(error_body(400, error_text(error), param=error.param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:MOST_QUOTED]
        body = error_body(error.status_code, f"{request.method} {path}: {error.detail}")
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
        return JSONResponse(error_body(status, error_text(error), code=code), status)

    @app.exception_handler(QueueFullError)
    async def queue_full(request: Request, error: QueueFullError) -> Response:
        headers = {"Retry-After": str(error.seconds)}
        return JSONResponse(error_body(429, str(error)), 429, headers=headers)

    @app.exception_handler(ModelBusyError)
    async def model_busy(request: Request, error: ModelBusyError) -> Response:
        headers = {"Retry-After": str(error.seconds)}
        body = error_body(503, error_text(error), code="model_busy")
        return JSONResponse(body, 503, headers=headers)

    @app.exception_handler(StoppingError)
    async def stopping(request: Request, error: StoppingError) -> Response:
        headers = {"Retry-After": STOPPING_RETRY_SECONDS}
        return JSONResponse(error_body(503, str(error)), 503, headers=headers)

    @app.exception_handler(FailedError)
    async def failed(request: Request, error: FailedError) -> Response:
        return JSONResponse(error_body(error.status, error_text(error)), error.status)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The server logs the traceback; clients of OpenAI's API expect JSON whatever happened.
        return JSONResponse(error_body(500, f"internal error: {type(error).__name__}"), 500)

    @app.exception_handler(ClientLeftError)
    async def client_left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)
