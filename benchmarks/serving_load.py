"""Does the server leak? Honest clients, and clients of every other kind, for as long as asked.

    python benchmarks/serving_load.py --minutes 30     # on an idle machine

64 streams run at all times over the steps of one run, more steps than `--keep` holds. Beside them
clients cancel at random, send bodies that are wrong, too large or not HTTP, connect and say
nothing, and read no answer. The server's memory, descriptors and threads are sampled every few
seconds, and /health is asked ten times a second.

The first quarter warms up: pools and caches fill once. Of the rest, the medians of the first and of
the last third are compared; the exit status is 1 if

- memory grew by more than 5% and more than 2 MB a minute,
- threads, or descriptors beside those of connections, grew by more than 8, or
- an honest stream failed otherwise than by 429 or 503.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from machine import describe

RESULTS = Path(__file__).parent / "results" / "serving_load.json"
SHAPE = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
STEPS = 3
STREAMS = 64
SAMPLE_SECONDS = 5.0
HEALTH_SECONDS = 0.1
WARM_UP = 0.25
"""Share of the time that is not compared."""
MOST_GROWTH = 0.05
MOST_BYTES_A_MINUTE = 2e6
MOST_MORE = 8
"""Threads, and descriptors beside those of connections."""
BAD_BODIES: list[bytes] = [
    b"{",
    b"\xff\xfe",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "nothing": 1}',
    b'{"model": "none", "prompt": "a"}',
    b'{"prompt": [' + b"0," * 100_000 + b"0]}",
    b'{"prompt": "' + b"a" * 1_000_000 + b'"}',
    b"[" * 10_000,
]


@dataclass
class Sample:
    """The server at one moment."""

    seconds: float
    memory: int
    """Resident bytes."""
    descriptors: int
    threads: int
    connections: int

    @property
    def own_descriptors(self) -> int:
        """Descriptors beside those of connections, whose number is the clients'."""
        return self.descriptors - self.connections


@dataclass
class Load:
    """One run of this script."""

    port: int
    end: float
    """As time.monotonic()."""
    models: list[str]
    tokens: int
    samples: list[Sample] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Honest requests that failed, by reason."""

    @property
    def goes_on(self) -> bool:
        """Whether time is left."""
        return time.monotonic() < self.end


def write_run(folder: Path) -> Path:
    """A run of random weights with several steps and a tokenizer of bytes."""
    from castalia.checkpoint import Store
    from castalia.config import dump_yaml
    from castalia.distributed import initialize
    from castalia.models import Decoder, NeoxConfig
    from castalia.models.init import start_weights
    from castalia.runs.config import RunConfig
    from castalia.tokenizers.tokenizer import train_tokenizer

    texts = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(texts, 1024, folder / "tokenizer.json")
    config = NeoxConfig(vocab_size=tokenizer.vocab_size, rotary_pct=0.25, **SHAPE)
    store = Store(folder / "run" / "checkpoints")
    for step in range(STEPS):
        model = Decoder(config)
        initialize(model, start_weights(model.config, step))
        files = {
            "config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 512})),
            "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
        }
        tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
        store.save(step, tensors, {"step": step}, files, asynchronous=False)
    return folder / "run"


@contextlib.asynccontextmanager
async def connection(load: Load) -> Any:
    """A connection, closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def post(body: bytes, path: str = "/v1/completions") -> bytes:
    """A request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def completion(load: Load) -> bytes:
    """A stream of a random model, after a random prompt."""
    body = {
        "model": random.choice(load.models),
        "prompt": random.choices(range(1, 250), k=random.randint(1, 64)),
        "max_tokens": random.randint(1, load.tokens),
        "temperature": 1,
        "ignore_eos": True,
        "stream": True,
    }
    return post(json.dumps(body).encode())


async def honest(load: Load) -> None:
    """A stream read to its end."""
    async with connection(load) as (reader, writer):
        began = time.perf_counter()
        writer.write(completion(load))
        status = (await reader.readline()).decode().strip()
        if " 200 " not in status:
            outcome = status.partition(" ")[2] or "no answer"
            load.outcomes[outcome] += 1
            # A full queue and busy models are answers; the client comes back.
            if not outcome.startswith(("429", "503")):
                load.failures[outcome] += 1
            await reader.read()
            await asyncio.sleep(0.5)
            return
        first = math.nan
        last = b""
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if math.isnan(first):
                first = time.perf_counter() - began
            last = line
        if last.strip() != b"data: [DONE]":
            load.failures[f"stream ended with {last[:80]!r}"] += 1
            return
        load.outcomes["200 OK"] += 1
        load.first_token.append(first)
        load.whole.append(time.perf_counter() - began)


async def leaver(load: Load) -> None:
    """A stream that is left after a random time."""
    async with connection(load) as (reader, writer):
        writer.write(completion(load))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1 << 20), random.random())
    load.outcomes["left"] += 1
    await asyncio.sleep(0.1)


async def bad_body(load: Load) -> None:
    """A body that must be refused."""
    async with connection(load) as (reader, writer):
        path = random.choice(("/v1/completions", "/v1/chat/completions", "/tokenize"))
        writer.write(post(random.choice(BAD_BODIES), path))
        status = (await reader.readline()).split()[1:2]
        load.outcomes[f"bad body {b''.join(status).decode()}"] += 1
        await reader.read()
    await asyncio.sleep(0.2)


async def not_http(load: Load) -> None:
    """Bytes that are not a request."""
    async with connection(load) as (reader, writer):
        writer.write(random.choice((b"hello\r\n\r\n", b"\x16\x03\x01\x00", b"GET\r\n\r\n")))
        writer.write_eof()
        await reader.read()
    load.outcomes["not HTTP"] += 1
    await asyncio.sleep(0.5)


async def half_open(load: Load) -> None:
    """A connection that begins a request and waits until the server ends it."""
    async with connection(load) as (reader, writer):
        writer.write(random.choice((b"", b"POST /v1/completions HTTP/1.1\r\nHost: loc")))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), random.uniform(0, 40))
    load.outcomes["half-open"] += 1


async def unread(load: Load) -> None:
    """A client that asks and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(client, ("127.0.0.1", load.port))
        await loop.sock_sendall(client, completion(load))
        await asyncio.sleep(random.uniform(0, 20))
    finally:
        client.close()
    load.outcomes["unread"] += 1


async def repeat(load: Load, client: Callable[[Load], Awaitable[None]]) -> None:
    """One client after the other."""
    while load.goes_on:
        try:
            await client(load)
        except OSError as error:
            # The server may reset a bad client; an honest one never.
            load.outcomes[f"{client.__name__}: {type(error).__name__}"] += 1
            if client is honest:
                load.failures[repr(error)] += 1
            await asyncio.sleep(0.5)


async def get(load: Load, path: str) -> bytes:
    """The body of an answer."""
    async with connection(load) as (reader, writer):
        writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = await reader.read()
    return bytes(answer.partition(b"\r\n\r\n")[2])


async def ask_health(load: Load) -> None:
    """The time of /health, again and again."""
    while load.goes_on:
        began = time.perf_counter()
        await get(load, "/health")
        load.health.append(time.perf_counter() - began)
        await asyncio.sleep(HEALTH_SECONDS)


async def sample(load: Load, server: psutil.Process) -> None:
    """The server, every few seconds."""
    began = time.monotonic()
    while load.goes_on:
        with server.oneshot():
            load.samples.append(
                Sample(
                    time.monotonic() - began,
                    server.memory_info().rss,
                    server.num_fds(),
                    server.num_threads(),
                    len(server.net_connections()),
                )
            )
        await asyncio.sleep(SAMPLE_SECONDS)


async def everybody(load: Load, server: psutil.Process) -> None:
    """All clients at once."""
    crowd = {honest: STREAMS, leaver: 16, bad_body: 4, not_http: 2, half_open: 64, unread: 4}
    clients = [repeat(load, client) for client, count in crowd.items() for _ in range(count)]
    await asyncio.gather(*clients, ask_health(load), sample(load, server))


async def until_idle(load: Load) -> float:
    """Seconds until the server has no texts left."""
    began = time.monotonic()
    while True:
        state = json.loads(await get(load, "/health"))
        if not (state["running"] or state["waiting"]):
            return time.monotonic() - began
        await asyncio.sleep(0.1)


def slope(samples: list[Sample]) -> float:
    """Bytes of memory a minute, by the median of the slopes of all pairs (Theil-Sen).

    One collection of cycles moves the line of least squares; it does not move this one.
    """
    step = max(1, len(samples) // 200)
    some = samples[::step]
    slopes = [
        (b.memory - a.memory) / (b.seconds - a.seconds) * 60
        for place, a in enumerate(some)
        for b in some[place + 1 :]
    ]
    return statistics.median(slopes) if slopes else 0.0


def thirds(samples: list[Sample], name: str) -> list[float]:
    """Medians of the three thirds after the warm-up."""
    kept = samples[int(len(samples) * WARM_UP) :]
    size = max(1, len(kept) // 3)
    parts = (kept[:size], kept[size:-size] or kept, kept[-size:])
    return [statistics.median(getattr(one, name) for one in part) for part in parts]


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the largest, in seconds."""
    if not values:
        return {}
    ordered = sorted(values)
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
        for name, share in places.items()
    }


def leaks_in(load: Load) -> list[str]:
    """What grew, and what else went wrong; see the criterion above."""
    leaks = []
    start, _, end = thirds(load.samples, "memory")
    growth = slope(load.samples[int(len(load.samples) * WARM_UP) :])
    if end > start * (1 + MOST_GROWTH) and growth > MOST_BYTES_A_MINUTE:
        leaks.append(
            f"memory grew from {start / 1e6:.0f} to {end / 1e6:.0f} MB, {growth / 1e6:.1f} MB a"
            " minute"
        )
    for name in ("own_descriptors", "threads"):
        start, _, end = thirds(load.samples, name)
        if end - start > MOST_MORE:
            leaks.append(f"{name} grew from {start:g} to {end:g}")
    if load.failures:
        leaks.append(f"honest streams failed: {dict(load.failures)}")
    return leaks


def start(model: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The server in a process of its own, once it answers."""
    command = [sys.executable, "-m", "castalia", "serve", model]
    command += ["--port", str(options.port), "--slots", str(options.slots)]
    command += ["--keep", str(options.keep), "--room", "60", "--patience", "10"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", options.port)):
            return server
        if server.poll() is not None:
            raise SystemExit(f"the server exited: {' '.join(command)}")
        time.sleep(0.1)
    raise SystemExit("the server did not answer within 120 s")


def report(load: Load, idle: float, last: Sample) -> dict[str, Any]:
    """The numbers, printed and returned."""
    growth = slope(load.samples[int(len(load.samples) * WARM_UP) :])
    result: dict[str, Any] = {
        "streams": len(load.whole),
        "first_token": percentiles(load.first_token),
        "whole": percentiles(load.whole),
        "health": percentiles(load.health),
        "memory_bytes_a_minute": growth,
        "seconds_until_idle": idle,
        "after": asdict(last),
        "outcomes": dict(sorted(load.outcomes.items())),
        "failures": dict(load.failures),
        "leaks": leaks_in(load),
    }
    for name in ("memory", "own_descriptors", "threads", "connections"):
        result[name] = dict(
            zip(("start", "middle", "end"), thirds(load.samples, name), strict=True)
        )
    memory = {name: f"{value / 1e6:.0f} MB" for name, value in result["memory"].items()}
    print(
        f"memory {memory}, {growth / 1e6:+.2f} MB a minute; afterwards {last.memory / 1e6:.0f} MB"
    )
    for name in ("own_descriptors", "threads", "connections"):
        print(f"{name} {result[name]}; afterwards {getattr(last, name)}")
    for name in ("first_token", "whole", "health"):
        shares = {key: f"{value:.3f} s" for key, value in result[name].items()}
        print(f"{name} {shares}")
    print(f"{len(load.whole)} whole streams; idle after {idle:.1f} s; {result['outcomes']}")
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a stream")
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Load the server, print, write JSON; exit 1 at a leak."""
    options = parse()
    random.seed(options.seed)
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        server = start(str(run), options)
        process = psutil.Process(server.pid)
        models = [f"run@step{step}" for step in range(STEPS)]
        end = time.monotonic() + options.minutes * 60
        load = Load(options.port, end, models, options.tokens)
        try:
            asyncio.run(everybody(load, process))
            idle = asyncio.run(until_idle(load))
            # Idle connections end, and dropped models are returned.
            time.sleep(12)
            load.end = time.monotonic() + 1
            tail = Load(options.port, load.end, models, 1)
            asyncio.run(sample(tail, process))
        finally:
            server.terminate()
            server.wait()
    result = report(load, idle, tail.samples[-1])
    record = {"machine": machine, "shape": SHAPE, "steps": STEPS}
    record |= {name: getattr(options, name) for name in ("minutes", "slots", "keep", "tokens")}
    samples = [asdict(one) for one in load.samples]
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record | result | {"samples": samples}, indent=1) + "\n")
    if result["leaks"]:
        raise SystemExit("; ".join(result["leaks"]))


if __name__ == "__main__":
    main()
