"""Connections that wait for their client: half-open, idle, unread, too many."""

import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from tests.fixtures.live_server import LiveServer

from castalia.serve import connections
from castalia.serve.connections import REFUSALS, ConnectionLimits, places
from castalia.serve.hosts import AllowedHosts
from castalia.serve.model_pool import ModelPool, ServeOptions

QUICK = ConnectionLimits(most=8, patience=0.4, keep_alive=0.4, stalled=0.4)
HALF = b"GET /health HTTP/1.1\r\nHo"
LONG = {"prompt": "a", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[LiveServer]:
    """Eight connections, and half a second of patience."""
    pool = ModelPool([str(run_folder)], ServeOptions(engine="torch", dtype="fp32", slots=2))
    running = LiveServer(pool, QUICK, hosts=AllowedHosts())
    yield running
    running.stop()


@pytest.fixture
def connect(server: LiveServer) -> Iterator[Callable[[bytes], socket.socket]]:
    """Callable: a connection on which these bytes were sent."""
    made = []

    def make(data: bytes) -> socket.socket:
        made.append(socket.create_connection(("127.0.0.1", server.port), timeout=120))
        made[-1].sendall(data)
        return made[-1]

    yield make
    for one in made:
        one.close()
    until(lambda: server.table.descriptors == 0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 10 s at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    """What the server sends before it closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def request(body: dict[str, object]) -> bytes:
    """A completion request."""
    data = json.dumps(body)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()


def error_in(answer: bytes) -> dict[str, object]:
    """OpenAI's error in a whole answer."""
    error: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


def test_a_client_that_sends_no_request_is_left(
    server: LiveServer, connect: Callable[[bytes], socket.socket]
) -> None:
    silent = connect(b"")
    half = connect(HALF)
    # Nor do drops of the next request keep an idle connection.
    second = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert second.recv(1 << 16).startswith(b"HTTP/1.1 200")
    second.sendall(b"G")
    assert read_all(silent) == b""
    answer = read_all(half)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert error_in(answer)["message"] == "the request did not arrive within 0.4 s"
    assert b" 408 " in read_all(second)
    assert server.table.ended["expired"] == 3
    # An idle connection ends by uvicorn's own clock.
    idle = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_all(idle).startswith(b"HTTP/1.1 200")
    assert 'castalia_ended_connections{reason="expired"} 3.0' in server.ask("/metrics")[1]


def test_half_open_connections_keep_nobody_out(
    server: LiveServer, connect: Callable[[bytes], socket.socket]
) -> None:
    before = server.table.ended["displaced"]
    halves = [connect(HALF) for _ in range(60)]
    assert server.ask("/health")[0] == 200
    assert server.complete(prompt="a", max_tokens=2)["choices"]
    assert len(server.table.admitted) <= QUICK.most
    assert server.table.descriptors <= QUICK.most + REFUSALS
    until(lambda: server.table.ended["displaced"] - before >= 60 - QUICK.most)
    until(lambda: not server.table.admitted)
    del halves


def test_a_connection_beyond_running_requests_is_503(
    server: LiveServer, connect: Callable[[bytes], socket.socket]
) -> None:
    streams = [connect(request(LONG)) for _ in range(QUICK.most)]
    for stream in streams[:2]:
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
    until(lambda: len(server.table.admitted) == QUICK.most and not server.table.waiting)
    beyond = connect(HALF)
    answer = read_all(beyond)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 1\r\n" in answer
    assert error_in(answer)["message"] == "the server has 8 connections already; retry later"
    assert error_in(answer)["type"] == "server_error"
    # Beyond the places for refusals they are closed at once.
    silent = [connect(b"") for _ in range(REFUSALS + 4)]
    until(lambda: server.table.descriptors == QUICK.most + REFUSALS)
    for one in silent[-4:]:
        assert read_all(one) == b""
    # The streams were not disturbed.
    server.table.limits = ConnectionLimits(most=100, keep_alive=0.4)
    try:
        assert server.ask("/health")[0] == 200
        for stream in streams[:2]:
            data = b""
            while b"[DONE]" not in data:
                data += stream.recv(1 << 16)
    finally:
        server.table.limits = QUICK


def test_an_answer_that_nobody_reads_is_given_up(
    server: LiveServer,
) -> None:
    before = server.table.ended["stalled"]
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        unread.connect(("127.0.0.1", server.port))
        # Pages of the OpenAPI description, more than the buffers of both sides hold.
        page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        unread.sendall(page * 200)
        until(lambda: server.table.ended["stalled"] == before + 1)
    until(lambda: server.table.descriptors == 0)


def test_what_is_not_http_gets_openais_error(
    server: LiveServer, connect: Callable[[bytes], socket.socket]
) -> None:
    answer = read_all(connect(b"hello\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ") and b"application/json" in answer
    assert error_in(answer)["type"] == "invalid_request_error"
    large = read_all(connect(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000))
    assert large.partition(b" ")[2][:3] in (b"400", b"431") and "message" in error_in(large)


def test_a_foreign_name_is_refused_without_a_key(server: LiveServer) -> None:
    status, answer, _ = server.ask("/v1/models", Host="evil.example:8000")
    assert status == 403 and answer["error"]["code"] == "host_not_allowed"
    assert "--allowed-host evil.example" in answer["error"]["message"]
    status, answer, _ = server.ask("/v1/models", Origin="http://evil.example")
    assert status == 403 and answer["error"]["message"].startswith("Origin 'http://evil.example'")


def test_places_are_bounded_by_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [256, 256]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.__setitem__(0, pair[0]))
    assert places(1024) == 256 - REFUSALS - connections.SPARE_DESCRIPTORS
    limits[1] = 4096
    assert places(1024) == 1024 and limits[0] == 1024 + REFUSALS + connections.SPARE_DESCRIPTORS
    limits[:] = [40, 40]
    assert places(1024) == 1
