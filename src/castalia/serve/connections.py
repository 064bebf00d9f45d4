"""Connections: how many at a time, and how long each may wait for its client.

uvicorn limits neither: a connection without a request lives for ever, and one too many ends in an
endless loop of `accept`. All that this server needs of uvicorn's insides stands here, for both of
its parsers (h11 and httptools).
"""

import asyncio
import errno
import http
import resource
import socket
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from castalia.serve.limits import App, closing_error

SPARE_DESCRIPTORS = 128
"""Descriptors kept for models, files and the event loop: a model of many shards opens them one
after the other, and libraries hold some pipes."""
REFUSALS = 32
"""Connections beyond the limit that are told so at a time; the others are closed at once."""
REFUSAL_SECONDS = 2.0
"""Time for a client beyond the limit to send a byte of its request. An answer before that would be
lost: the bytes that then arrive at a closed connection reset it."""
REFUSED_RETRY_SECONDS = 1
MOST_HEAD_BYTES = 1 << 16
"""Bytes of a request's line and headers; h11 stops at 16 KiB by itself, httptools never."""
TICKS = 10
"""uvicorn's ticks between two looks at all connections, a second."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may take of the server before it sends a request and after it got an answer."""

    most: int = 1024
    """Connections at a time."""
    patience: float = 30.0
    """Seconds from the connection, or from the first byte of a further request, to its headers."""
    keep_alive: float = 5.0
    """Seconds of an idle connection between two requests."""
    stalled: float = 30.0
    """Seconds in which a client may leave its answer unread."""


class ConnectionTable:
    """The connections of a server, and counts of those that ended at a limit."""

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.limits = limits or ConnectionLimits()
        self.descriptors = 0
        """Sockets accepted and not yet closed."""
        self.admitted: set[BoundedConnection] = set()
        self.refusing: set[BoundedConnection] = set()
        """Connections beyond the limit that are about to be told so."""
        self.waiting: dict[BoundedConnection, None] = {}
        """Admitted ones whose client has not sent a whole request, longest first."""
        self.ended: Counter[str] = Counter()
        """Connections ended by the server, by reason."""

    @property
    def is_full(self) -> bool:
        """Whether not even a refusal has a place."""
        return self.descriptors >= self.limits.most + REFUSALS

    @property
    def settles(self) -> bool:
        """Whether descriptors are about to be admitted, or closed, in this turn of the loop."""
        return self.descriptors > len(self.admitted) + len(self.refusing)

    def admit(self, connection: "BoundedConnection") -> bool:
        """Whether a new connection has a place; the one that waits longest makes room.

        Clients that never send a request thus cannot keep out those that do.
        """
        if len(self.admitted) >= self.limits.most and not self.displace():
            self.refusing.add(connection)
            return False
        self.admitted.add(connection)
        self.waiting[connection] = None
        return True

    def displace(self) -> bool:
        """Close the connection that has waited longest; False if all have requests."""
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        self.end(oldest, "displaced")
        return True

    def end(self, connection: "BoundedConnection", reason: str) -> None:
        """Close a connection without another word."""
        self.ended[reason] += 1
        self.forget(connection)
        connection.transport.abort()

    def forget(self, connection: "BoundedConnection") -> None:
        """A connection is closed or about to be."""
        self.admitted.discard(connection)
        self.refusing.discard(connection)
        self.waiting.pop(connection, None)

    def check(self) -> None:
        """End the connections that have used up their time."""
        now = time.monotonic()
        for connection in [*self.admitted, *self.refusing]:
            connection.check(now)


class BoundedConnection(asyncio.Protocol):
    """What a connection of uvicorn lacks: limits in time. Mixed into one of its protocols.

    `cycle` is uvicorn's state of one request; it is replaced when the headers of the next are
    complete.
    """

    table: ConnectionTable
    transport: asyncio.Transport
    cycle: Any
    since: float
    """When it was made."""
    head_since: float | None = None
    """From when the headers are awaited; None before the first byte of a further request."""
    head_bytes: int = 0
    unsent: int = 0
    """Bytes of the answer in the transport's buffer at the last check."""
    stalled_since: float | None = None
    """From when on the client has read nothing of them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place, or be refused at the first byte."""
        super().connection_made(transport)
        self.since = time.monotonic()
        self.head_since = self.since
        self.table.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the place."""
        self.table.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on to uvicorn's parser and see what they completed."""
        if self in self.table.refusing:
            self.table.ended["refused"] += 1
            most = self.table.limits.most
            message = f"the server has {most} connections already; retry later"
            self.answer(503, message, retry=REFUSED_RETRY_SECONDS)
            return
        if self.transport.is_closing():
            return
        super().data_received(data)
        self.look(len(data))

    def on_response_complete(self) -> None:
        """An answer is complete; the next request may be waiting in the parser already."""
        super().on_response_complete()  # type: ignore[misc]
        self.head_since = None
        self.look(0)

    def look(self, arrived: int) -> None:
        """Note what the client has still to send, after `arrived` more bytes of it."""
        if self not in self.table.admitted:
            return
        if self.has_request:
            self.head_since = None
            self.head_bytes = 0
            if not self.cycle.more_body:
                self.table.waiting.pop(self, None)
            return
        self.table.waiting.setdefault(self)
        self.head_bytes += arrived
        if arrived and self.head_since is None:
            # uvicorn stops its own clock of idle connections at this byte.
            self.head_since = time.monotonic()
        if self.head_bytes > MOST_HEAD_BYTES:
            self.table.ended["large head"] += 1
            self.answer(431, f"the request's headers exceed {MOST_HEAD_BYTES:,} bytes")

    @property
    def has_request(self) -> bool:
        """Whether the headers of a request are complete, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def check(self, now: float) -> None:
        """End the connection if its client has used up its time; `now` as time.monotonic()."""
        limits = self.table.limits
        if self in self.table.refusing:
            if now - self.since > REFUSAL_SECONDS:
                self.table.end(self, "refused")
            return
        if self.head_since is not None and now - self.head_since > limits.patience:
            self.expire()
            return
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self.unsent or self.stalled_since is None:
            self.stalled_since = now
        elif now - self.stalled_since > limits.stalled:
            self.table.end(self, "stalled")
        self.unsent = unsent

    def expire(self) -> None:
        """End a connection whose headers are late; a client that sent some of them is told so."""
        if not self.head_bytes:
            self.table.end(self, "expired")
            return
        self.table.ended["expired"] += 1
        self.head_since = None
        self.answer(408, f"the request did not arrive within {self.table.limits.patience:g} s")

    def resume_writing(self) -> None:
        """The client reads on."""
        self.stalled_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP; in place of uvicorn's answer in plain text."""
        if self.has_request and self.cycle.response_started:
            # Amid an answer nothing more can be said.
            self.transport.close()
            return
        self.answer(400, f"{msg.rstrip('.')}: expected HTTP/1.1")

    def answer(self, status: int, message: str, *, retry: int | None = None) -> None:
        """Answer with an error that no request of the app stands for, and close."""
        headers, data = closing_error(status, message, retry=retry)
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + data)
        self.transport.close()


class CountedSocket(socket.socket):
    """An accepted connection; the table knows when its descriptor is closed."""

    table: ConnectionTable | None = None

    def close(self) -> None:
        """Close the descriptor."""
        if self.table is not None:
            self.table.descriptors -= 1
            self.table = None
        super().close()


class BoundedListener(socket.socket):
    """A listening socket that never takes more descriptors than the table has places.

    The event loop accepts many connections before it makes the first of them: a limit at that
    point would come too late.
    """

    table: ConnectionTable

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises  BlockingIOError if there is none, or the loop must first make and close others.
        """
        if self.table.is_full and self.table.settles:
            raise BlockingIOError
        try:
            accepted, address = super().accept()
        except OSError as error:
            # Models and files have taken the descriptors that were kept for them.
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.table.displace():
                raise BlockingIOError from None
            raise
        if self.table.is_full:
            self.table.ended["refused"] += 1
            accepted.close()
            # Not the next one at once: in a flood this would be an endless loop.
            raise BlockingIOError
        counted = CountedSocket(accepted.family, accepted.type, accepted.proto, accepted.detach())
        counted.table = self.table
        self.table.descriptors += 1
        return counted, address


class BoundedServer(uvicorn.Server):
    """uvicorn's server with limits of connections."""

    def __init__(
        self, app: App, table: ConnectionTable, *, grace: int, log_level: str = "warning"
    ) -> None:
        """`grace` are the seconds of running requests at a stop."""
        self.table = table
        connection = type(
            "ServedConnection", (BoundedConnection, AutoHTTPProtocol), {"table": table}
        )
        super().__init__(
            uvicorn.Config(
                app,
                # Another event loop would not call the listener's `accept`.
                loop="asyncio",
                http=connection,
                ws="none",
                log_level=log_level,
                timeout_keep_alive=table.limits.keep_alive,  # type: ignore[arg-type]
                timeout_graceful_shutdown=grace,
            )
        )
        shortest = min(table.limits.patience, table.limits.stalled)
        self.ticks = max(1, min(TICKS, int(TICKS * shortest / 4)))

    def listen(self, listener: socket.socket) -> None:
        """Serve on a bound socket until a signal."""
        bounded = BoundedListener(listener.family, listener.type, listener.proto, listener.detach())
        bounded.table = self.table
        self.run(sockets=[bounded])

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if counter % self.ticks == 0:
            self.table.check()
        return await super().on_tick(counter)


def places(wanted: int) -> int:
    """Connections that this process has descriptors for, at most `wanted`.

    Raises the process's own limit of open files as far as it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + REFUSALS + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    # Of very few descriptors half are for connections.
    return max(1, soft - REFUSALS - SPARE_DESCRIPTORS, soft // 2 - REFUSALS)
