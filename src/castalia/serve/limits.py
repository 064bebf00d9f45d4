"""Checks before a request reaches an endpoint: API key, names, size and arrival time.

Plain ASGI: Starlette's middleware class would buffer streamed answers.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from castalia.serve.hosts import AllowedHosts

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = ("/health", "/metrics")
"""Paths open without a key: load balancers and Prometheus usually have none."""


class RequestLimits:
    """ASGI middleware: checks key and names and reads the whole body before it calls the app.

    The body may have `most_bytes` bytes and take `seconds` to arrive, so that a slow client holds
    a connection but never a worker of the app.
    """

    def __init__(
        self,
        app: App,
        *,
        most_bytes: int,
        seconds: float,
        api_key: str | None,
        hosts: AllowedHosts | None = None,
    ) -> None:
        """`hosts` are the names that a server without a key answers to; None allows all."""
        self.app = app
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.api_key = api_key
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not self.admits(scope["path"], headers):
            await refuse(
                send, 401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            )
            return
        # A page of another site does not know the key, so a server with one needs no check.
        if self.hosts is not None and not self.api_key:
            fault = self.hosts.fault(scope["headers"])
            if fault is not None:
                await refuse(send, 403, fault, code="host_not_allowed")
                return
        # An honest Content-Length spares reading a body that is refused anyway.
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most_bytes:
            await self.too_large(send)
            return
        try:
            body = await asyncio.wait_for(self.read(receive), self.seconds)
        except TimeoutError:
            await refuse(send, 408, f"the request did not arrive within {self.seconds:g} s")
            return
        if body is None:
            await self.too_large(send)
            return
        held = [body]
        # The text that it asks for may take minutes, and needs no body.
        del body
        await self.app(scope, replay(held, receive), send)

    def admits(self, path: str, headers: dict[bytes, bytes]) -> bool:
        """Whether the request carries the API key, or needs none."""
        if not self.api_key or path in OPEN_PATHS:
            return True
        # Constant time: the duration of a comparison must not reveal a correct prefix.
        expected = f"Bearer {self.api_key}".encode()
        return hmac.compare_digest(headers.get(b"authorization", b""), expected)

    async def read(self, receive: Receive) -> bytes | None:
        """The body; None if it exceeds the limit."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    async def too_large(self, send: Send) -> None:
        """Answer 413."""
        await refuse(send, 413, f"the request body exceeds the limit of {self.most_bytes:,} bytes")


def replay(held: list[bytes], receive: Receive) -> Receive:
    """A `receive` that gives away the body in `held`, then the connection's own messages (a
    disconnect)."""

    async def next_message() -> Message:
        if not held:
            return await receive()
        return {"type": "http.request", "body": held.pop(), "more_body": False}

    return next_message


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    default = "invalid_request_error" if status < 500 else "server_error"
    kind = kinds.get(status, default)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send: Send, status: int, message: str, *, code: str | None = None) -> None:
    """Answer with an error and close the connection.

    Kept alive, the connection would take the unread rest of the body for the next request.
    """
    headers, data = closing_error(status, message, code=code)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def closing_error(
    status: int, message: str, *, code: str | None = None, retry: int | None = None
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error after which the connection is closed.

    retry   seconds for Retry-After.
    """
    data = json.dumps(error_body(status, message, code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry is not None:
        headers.append((b"retry-after", str(retry).encode()))
    return headers, data
