"""From the bytes of a request to its model, beside the event loop where that takes long."""

import inspect
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from castalia.core.errors import MOST_QUOTED, ConfigError, nearest, quoted
from castalia.core.unicode import require_unicode_in
from castalia.serve.body_scan import require_few_values
from castalia.serve.fields import Body
from castalia.serve.forms import ResponseFormat, SchemaFormat, StructuredOutputs
from castalia.serve.lanes import LONG, Lanes
from castalia.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
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
B = TypeVar("B", bound=Body)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""The escape of half of a pair: a body that is UTF-8 can hold one in no other way."""
JSON_TYPE = re.compile(r"application/([^;]+\+)?json\s*(;|$)", re.IGNORECASE)
NOT_A_LIST_OF_PROMPTS = (
    "prompt: expected a string, a list of strings, a list of token ids, or a list of lists of token"
    " ids"
)


class InvalidRequestError(ConfigError):
    """A body that is not what its endpoint takes; `param` is the field, None the whole body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class SmallNumbers(dict[str, int]):
    """Numbers by their digits: the short ones, of which a list of ids has many, exist once.

    Calls of Python for numbers also let other threads run while a long list is parsed.
    """

    def __missing__(self, digits: str) -> int:
        return int(digits)


SMALL = SmallNumbers({str(number): number for number in range(10_000)})


def whole_number(digits: str) -> int:
    """The integer that JSON spells."""
    return SMALL[digits]


def fraction(digits: str) -> float:
    """The other number that JSON spells."""
    return float(digits)


LARGE_BODY = json.JSONDecoder(parse_int=whole_number, parse_float=fraction)


class BodyRoute(APIRoute):
    """A route that reads the body of its endpoint `(body, request)` itself.

    FastAPI would parse and check it on the event loop. It still describes the body on the OpenAPI
    page.
    """

    lanes: Lanes

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI's `APIRoute`."""
        endpoint = self.endpoint
        kind = inspect.get_annotations(endpoint).get("body")
        if kind is None:
            return super().get_route_handler()
        lanes = self.lanes

        async def handle(request: Request) -> Response:
            body = await read_body(request, kind, lanes)
            response: Response = await endpoint(body, request)
            return response

        return handle


def route_class(lanes: Lanes) -> type[BodyRoute]:
    """The class of the routes that read their bodies in these threads."""
    return type("LaneRoute", (BodyRoute,), {"lanes": lanes})


async def read_body(request: Request, kind: type[B], lanes: Lanes) -> B:
    """The body of a request.

    Raises  InvalidRequestError if it is not what `kind` says.
    """
    given = request.headers.get("content-type")
    if given is not None and not JSON_TYPE.match(given):
        raise InvalidRequestError(f"the content type is {quoted(given)}; expected application/json")
    held = [await request.body()]
    size = len(held[0])
    # Starlette keeps the bytes with the request, whose text may take minutes.
    request._body = b""
    if size < LONG:
        return parsed(held, kind)
    return await lanes.run(size, parsed, held, kind)


def parsed(held: list[bytes], kind: type[B]) -> B:
    """The request in the bytes that `held` holds; they are taken out of it.

    Raises  InvalidRequestError if it is not what `kind` says, with the first error alone.
    """
    size = len(held[0])
    value = json_value(held)
    try:
        return kind.model_validate(value).weighs(size)
    except ValidationError as error:
        message, field = validation_message(error.errors(include_url=False, include_input=False))
        raise InvalidRequestError(message, field) from None


def json_value(held: list[bytes]) -> Any:
    """The value of the JSON in the bytes that `held` holds.

    Raises  InvalidRequestError if it is not JSON, or exceeds the limits.
    """
    body = held.pop()
    try:
        require_few_values(body)
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from None
    may_break_pairs = SURROGATE.search(body) is not None
    decode = json.loads if len(body) < LONG else LARGE_BODY.decode
    try:
        text = body.decode("utf-8-sig")
        del body
        value = decode(text)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not JSON: byte {error.start} is not UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body is not JSON: character {error.pos}, {error.msg}"
        ) from None
    except ValueError:
        # Python's limit of the digits of a number.
        raise InvalidRequestError("the body has a number of too many digits") from None
    if may_break_pairs:
        try:
            require_unicode_in(value, "the request")
        except ConfigError as error:
            raise InvalidRequestError(f"the request: {error}") from None
    return value


def validation_message(problems: Sequence[Any]) -> tuple[str, str | None]:
    """One sentence about pydantic's errors, and the name of the field (None: the whole body)."""
    first = problems[0]
    path = [str(step) for step in first["loc"]]
    if path[:1] == ["prompt"] and len(path) > 1:
        # pydantic reports each of the four types that it tried; one sentence says it all.
        return NOT_A_LIST_OF_PROMPTS, "prompt"
    if first["type"] == "extra_forbidden":
        unknown = ".".join(path)
        if path[-1] in FIELD_NAMES:
            return f"{unknown}: not a field of this endpoint", unknown
        return f"unknown field {quoted(unknown)}{nearest(path[-1], FIELD_NAMES)}", unknown[
            :MOST_QUOTED
        ]
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
    for step in steps:
        if not (isinstance(step, int) or step.isdigit() or step in FIELD_NAMES):
            break
        path.append(str(step)[:MOST_QUOTED])
    return ".".join(path)
