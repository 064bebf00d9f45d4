"""`castalia serve`."""

import gc
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.core.errors import ConfigError
from castalia.terminal.flags import EngineFlags, grouped, panel

if TYPE_CHECKING:
    from castalia.serve.connections import BoundedServer, ConnectionLimits
    from castalia.serve.model_pool import ServeOptions

LISTEN = panel("Address")
LIMITS = panel("Limits")
SERVED_ROWS = 8
"""Texts at a time for which the speeds of dtypes are compared."""
HERE = ("127.0.0.1", "localhost", "::1")
"""Hosts that other machines cannot reach."""


@dataclass(frozen=True)
class ListenFlags:
    """Options about the address and who may use it."""

    host: Annotated[
        str, LISTEN(help="Address to listen on; 0.0.0.0 is reachable from other machines.")
    ] = "127.0.0.1"
    port: Annotated[
        int, LISTEN(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000
    api_key: Annotated[
        str | None,
        LISTEN(
            metavar="KEY",
            envvar="CASTALIA_API_KEY",
            help="Require this key in Authorization headers.",
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        LISTEN(
            metavar="NAME",
            help="Another name that requests to a server without a key may give as Host or Origin;"
            " * allows all. May be repeated.",
        ),
    ] = None


@dataclass(frozen=True)
class LimitFlags:
    """Options about what the server takes on at a time."""

    slots: Annotated[
        int, LIMITS(metavar="N", min=1, help="Texts continued at a time; more wait.")
    ] = 16
    queue: Annotated[
        int,
        LIMITS(metavar="N", min=1, help="Texts that may wait; clients beyond them get status 429."),
    ] = 256
    keep: Annotated[
        int,
        LIMITS(
            metavar="N",
            min=1,
            help="Models in memory; the one idle longest makes room, and one more is there while it"
            " is loaded.",
        ),
    ] = 1
    room: Annotated[
        float,
        LIMITS(
            metavar="SECONDS",
            min=0.1,
            help="Time for which a request waits until other models make room; then status 503.",
        ),
    ] = 30.0
    max_body: Annotated[int, LIMITS(metavar="MIB", min=1, help="Largest request, in MiB.")] = 8
    patience: Annotated[
        float,
        LIMITS(
            metavar="SECONDS",
            min=0.1,
            help="Time from the connection to a request's headers, and from these to its end.",
        ),
    ] = 30.0
    connections: Annotated[
        int,
        LIMITS(
            metavar="N",
            min=1,
            help="Connections at a time. Beyond them the one that waits longest for a request is"
            " closed, else the client gets status 503.",
        ),
    ] = 1024
    keep_alive: Annotated[
        float,
        LIMITS(metavar="SECONDS", min=0, help="Time of an idle connection between two requests."),
    ] = 5.0
    stalled: Annotated[
        float,
        LIMITS(
            metavar="SECONDS", min=0.1, help="Time in which a client may leave its answer unread."
        ),
    ] = 30.0
    grace: Annotated[
        int, LIMITS(metavar="SECONDS", min=0, help="Time for running requests at a stop.")
    ] = 30


@grouped
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs (all their steps), RUN/step1000, Hugging Face folders or exports.",
        ),
    ],
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Adapter over the one MODEL, a run that trained it or a folder of PEFT; a request"
            " chooses it by NAME. May be repeated: the torch engine has the base in memory once.",
        ),
    ] = None,
    listen: ListenFlags,
    running: EngineFlags,
    limits: LimitFlags,
) -> None:
    """Serve models over OpenAI's API.

    The paths are /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics.

    Examples:

      castalia serve runs/demo

      castalia serve runs/a runs/b --keep 2 --port 8080 --api-key secret

      castalia serve runs/demo --adapter poet=runs/lora --adapter coder=peft/coder
    """
    from castalia.core.extras import require

    # Before the server's modules, which import them: a missing extra is one sentence.
    require("uvicorn", "serve", "castalia serve")
    require("fastapi", "serve", "castalia serve")
    from castalia.inference.default_engine import quicker
    from castalia.serve.app import make_app
    from castalia.serve.connections import BoundedServer, ConnectionTable
    from castalia.serve.hosts import AllowedHosts
    from castalia.serve.model_pool import ModelPool

    # What is imported stays: searched for cycles, it would stop every request for a second.
    gc.freeze()
    pool = ModelPool(models, serve_options(running, limits), named_adapters(adapter or []))
    table = ConnectionTable(connection_limits(limits))
    app = make_app(
        pool,
        api_key=listen.api_key,
        most_bytes=limits.max_body << 20,
        patience=limits.patience,
        hosts=AllowedHosts([listen.host, *(listen.allowed_host or [])]),
        connections=table,
    )
    if sentence := quicker(pool.get(None).model, rows=SERVED_ROWS):
        typer.echo(f"castalia: {sentence}", err=True)
    run(BoundedServer(app, table, grace=limits.grace), list(pool.locations), listen)


def serve_options(running: EngineFlags, limits: LimitFlags) -> "ServeOptions":
    """How models are loaded, and how many texts each accepts."""
    from castalia.serve.model_pool import ServeOptions

    engine = (running.engine, running.dtype, running.cache)
    return ServeOptions(
        *engine, limits.slots, limits.queue, limits.keep, limits.room, running.verify
    )


def connection_limits(limits: LimitFlags) -> "ConnectionLimits":
    """The limits of connections; says so if there are not descriptors for all of them."""
    from castalia.serve.connections import ConnectionLimits, places

    most = places(limits.connections)
    if most < limits.connections:
        typer.echo(
            f"castalia: warning: {most} connections at a time, not {limits.connections}: this"
            " process may not open more files; raise the limit (ulimit -n)",
            err=True,
        )
    return ConnectionLimits(most, limits.patience, limits.keep_alive, limits.stalled)


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything says that it is served.

    Raises  ConfigError if the address is in use or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By the number of the protocol asyncio knows connections whose answers may not wait for the
    # acknowledgement of what went before, 40 ms on a connection that is used again.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # As uvicorn does: a server that was just stopped leaves its port in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --host or --port"
            " (--port 0 takes a free one)"
        ) from None
    return listener


def run(server: "BoundedServer", names: list[str], listen: ListenFlags) -> None:
    """Listen until a signal; says first what is served where."""
    if listen.host not in HERE and not listen.api_key:
        typer.echo(
            f"castalia: warning: {listen.host} is reachable from other machines, which may all use"
            " it; set --api-key",
            err=True,
        )
    # Before the first line is printed: uvicorn would find a port in use only after it.
    with listening(listen.host, listen.port) as listener:
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        # The port of the socket, because port 0 takes a free one.
        typer.echo(
            f"castalia: serving {', '.join(names)} on http://{host}:{listener.getsockname()[1]}",
            err=True,
        )
        with suppress(KeyboardInterrupt):  # Ctrl-C is how a server ends
            server.listen(listener)


def named_adapters(words: list[str]) -> dict[str, str]:
    """Name and path of each NAME=PATH.

    Raises  ConfigError for another form, or a name that comes twice.
    """
    adapters: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--adapter {word}: expected NAME=PATH, such as poet=runs/lora")
        if name in adapters:
            raise ConfigError(f"--adapter {word}: the name {name} comes twice")
        adapters[name] = path
    return adapters
