"""What a server asks of a request before it looks at it: size, patience, key. Plain ASGI, so that streams pass."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN_PATHS = ("/health", "/metrics")
"""They need no key: what watches a server has none."""


class Limits:
    """Checks the key and reads the whole body, at most `most_bytes` within `seconds`, before the app is called."""

    def __init__(self, app: App, *, most_bytes: int, seconds: float, api_key: str | None) -> None:
        self.app, self.most_bytes, self.seconds, self.api_key = app, most_bytes, seconds, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if (
            self.api_key
            and scope["path"] not in OPEN_PATHS
            and not self.knows(headers.get(b"authorization", b""))
        ):
            await refuse(
                send, 401, "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            )
            return
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
        await self.app(scope, replay(body, receive), send)

    def knows(self, header: bytes) -> bool:
        """Whether the header carries the key; takes the same time for every wrong one."""
        return hmac.compare_digest(header, f"Bearer {self.api_key}".encode())

    async def read(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large."""
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
        """413."""
        await refuse(send, 413, f"the request is larger than {self.most_bytes:,} bytes")


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what comes after it: the client's leaving."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error and let the connection go: the rest of the body may still be on its way."""
    data = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
