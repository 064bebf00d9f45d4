"""The server under load on the loopback: latency, throughput, and the cost of disconnects.

    python benchmarks/serving.py        # Pythia-70M's shape, random weights; on an idle machine
    python benchmarks/serving.py --checkpoint runs/demo --rounds 1 --new 8
    python benchmarks/serving.py --parts prefixes --quick    # a tiny model, to see that it runs

`castalia serve` runs in a process of its own. Three things are measured:

clients     in each round, 1, 8 and 64 clients take their turn. Each client requests a stream of 64
            tokens after a prompt of 32. Time to the first token starts with the request, so it
            includes the queue.
leavers     memory, files and time after a thousand clients that disconnect.
prefixes    seconds until four prompts of 290 tokens are read and have their first token, on the
            engines native and torch in fp32: all new; one of which shares 200 tokens with a slot;
            and the next turn of a chat, 30 tokens behind a prompt of 290, alone.
"""

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe, instructions, summary

CLIENTS = (1, 8, 64)
RESULTS = Path(__file__).parent / "results" / "serving.json"
SHAPE = {
    "num_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
"""Pythia-70M, arXiv:2304.01373, table 1."""
LEAVERS = 1000
"""Clients that disconnect early."""
TINY = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
PROMPT = 290
"""Tokens of a prompt in the cases of shared prefixes."""
SHARED = 200
"""Tokens that one of four prompts shares with a slot."""
TURN = 30
"""Tokens of a chat's next turn."""
ENGINES = ("native", "torch")


def write_model(folder: Path, shape: dict[str, int] = SHAPE) -> Path:
    """A run with random weights and a tokenizer trained on Python's standard library."""
    from castalia.checkpoint import Store
    from castalia.config import dump_yaml
    from castalia.distributed import initialize
    from castalia.models import Decoder, NeoxConfig
    from castalia.models.init import start_weights
    from castalia.runs.config import RunConfig
    from castalia.tokenizers.tokenizer import train_tokenizer

    texts = [
        path.read_text("utf-8", "ignore")
        for path in sorted(Path(os.__file__).parent.glob("*.py"))[:80]
    ]
    tokenizer = train_tokenizer(texts, 8192, folder / "tokenizer.json")
    config = NeoxConfig(vocab_size=tokenizer.vocab_size, rotary_pct=0.25, **shape)
    model = Decoder(config)
    initialize(model, start_weights(model.config, 0))
    files = {
        "config.yaml": dump_yaml(RunConfig(model=config, data={"seq_length": 2048})),
        "tokenizer.json": (folder / "tokenizer.json").read_text("utf-8"),
    }
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    Store(folder / "run" / "checkpoints").save(0, tensors, {"step": 0}, files, asynchronous=False)
    return folder / "run"


async def ask(port: int, body: dict[str, Any]) -> asyncio.StreamReader:
    """Send a request; return the reader of the answer, with its writer as an attribute."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    reader.writer = writer  # type: ignore[attr-defined]
    return reader


async def stream(port: int, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first event and to the end of one stream."""
    began = time.perf_counter()
    reader = await ask(port, body)
    first = math.nan
    status = (await reader.readline()).decode()
    if " 200 " not in status:
        raise SystemExit(f"{status.strip()}: {(await reader.read()).decode()}")
    async for line in reader:
        if line.startswith(b"data: ") and math.isnan(first):
            first = time.perf_counter() - began
    reader.writer.close()  # type: ignore[attr-defined]
    return first, time.perf_counter() - began


def body_of(new: int, place: int) -> dict[str, Any]:
    """A request unique to each client, so that no prompt comes from the prefix cache."""
    ids = random.Random(place).choices(range(1, 250), k=32)
    return {
        "prompt": ids,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 0,
    }


async def round_of(port: int, clients: int, new: int, seed: int) -> dict[str, Any]:
    """All clients at once, with 64 streams in total but at most four per client."""
    times = max(1, min(4, 64 // clients))

    async def client(place: int) -> list[tuple[float, float]]:
        return [
            await stream(port, body_of(new, seed + 1000 * place + turn)) for turn in range(times)
        ]

    began = time.perf_counter()
    done = [pair for pairs in await asyncio.gather(*map(client, range(clients))) for pair in pairs]
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": clients * times * new / seconds,
        "first": [a for a, _ in done],
        "whole": [b for _, b in done],
    }


async def leave(port: int, new: int) -> None:
    """Many clients that disconnect after the first bytes."""
    # More at once would measure the queue, not the disconnects.
    gate = asyncio.Semaphore(16)

    async def one(place: int) -> None:
        async with gate:
            reader = await ask(port, body_of(new, 10**6 + place))
            await reader.read(200)
            reader.writer.close()  # type: ignore[attr-defined]

    await asyncio.gather(*map(one, range(LEAVERS)))


def percentile(values: list[float], share: float) -> float:
    """The value not exceeded by this share of all values."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def get(port: int, path: str) -> str:
    """A page of the server."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return str(answer.read().decode())


def post(port: int, body: dict[str, Any]) -> float:
    """Seconds until a request without a stream is answered."""
    import urllib.request

    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()
    return time.perf_counter() - began


def start(
    model: str,
    options: argparse.Namespace,
    port: int,
    queue: int = 2000,
    engine: tuple[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start the server in a process of its own, and wait until it answers.

    engine  name and dtype; None takes the dtype of the options, of which `default` is none.
    """
    command = [sys.executable, "-m", "castalia", "serve", model, "--port", str(port)]
    if engine is not None:
        command += ["--engine", engine[0], "--dtype", engine[1]]
    elif options.dtype != "default":
        command += ["--dtype", options.dtype]
    command += ["--slots", str(options.slots), "--queue", str(queue)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            get(port, "/health")
            return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"the server exited: {' '.join(command)}") from None
            time.sleep(0.1)
    raise SystemExit("the server did not answer within 60 s")


def measure(port: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, by number of clients."""
    rounds_by_clients: dict[int, list[dict[str, Any]]] = {clients: [] for clients in CLIENTS}
    # Not counted: the first passes compile and tune kernels.
    asyncio.run(round_of(port, 1, options.new, 5))
    for turn in range(options.rounds):
        for clients in CLIENTS:
            rounds_by_clients[clients].append(
                asyncio.run(round_of(port, clients, options.new, 10**4 * turn + clients))
            )
    table = {}
    for clients, rounds in rounds_by_clients.items():
        first = [value for one in rounds for value in one["first"]]
        whole = [value for one in rounds for value in one["whole"]]
        table[str(clients)] = {
            "tokens_per_second": summary(one["tokens_per_second"] for one in rounds),
            "first_token_p50": percentile(first, 0.5),
            "first_token_p99": percentile(first, 0.99),
            "whole_p50": percentile(whole, 0.5),
            "whole_p99": percentile(whole, 0.99),
            "streams": len(whole),
        }
    return table


def measure_leavers(port: int, server: subprocess.Popen[bytes], new: int) -> dict[str, Any]:
    """Growth of memory and open files over disconnects, and seconds until the server is idle."""
    process = psutil.Process(server.pid)
    # A first time without counting, because pools and caches fill once.
    asyncio.run(leave(port, new))
    before = process.memory_info().rss
    files = process.num_fds()
    asyncio.run(leave(port, new))
    began = time.perf_counter()
    while (state := json.loads(get(port, "/health")))["running"] or state["waiting"]:
        time.sleep(0.01)
    idle = time.perf_counter() - began
    return {
        "clients": LEAVERS,
        "memory_growth_mb": (process.memory_info().rss - before) / 1e6,
        "open_files_growth": process.num_fds() - files,
        "seconds_until_idle": idle,
    }


def prefixes_of(port: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case of shared prefixes in every round."""
    draw = random.Random(7)

    def ids(count: int) -> list[int]:
        return draw.choices(range(1, 250), k=count)

    def first_tokens(prompts: list[list[int]]) -> float:
        return post(port, {"prompt": prompts, "max_tokens": 1, "temperature": 0})

    times: dict[str, list[float]] = {"fresh": [], "shared": [], "turn": []}
    # The first round is not counted: it compiles and tunes kernels.
    for turn in range(rounds + 1):
        kept = ids(PROMPT)
        first_tokens([kept])
        round_times = {
            "fresh": first_tokens([ids(PROMPT) for _ in range(4)]),
            "shared": first_tokens(
                [*(ids(PROMPT) for _ in range(3)), [*kept[:SHARED], *ids(PROMPT - SHARED)]]
            ),
            "turn": first_tokens([[*kept, *ids(TURN)]]),
        }
        if turn:
            for name, value in round_times.items():
                times[name].append(value)
    return times


def measure_prefixes(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The cases of shared prefixes on each engine."""
    table: dict[str, Any] = {}
    for engine in ENGINES:
        server = start(model, options, options.port, engine=(engine, "fp32"))
        try:
            times = prefixes_of(options.port, options.rounds)
        finally:
            server.terminate()
            server.wait()
        table[engine] = {name: summary(values) for name, values in times.items()}
        cells = [f"{name} {row['median']:.3f} s" for name, row in table[engine].items()]
        ratio = table[engine]["shared"]["median"] / table[engine]["fresh"]["median"]
        print(f"{engine:<7} {', '.join(cells)}; shared / fresh {ratio:.2f}", flush=True)
    return table


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", help="model to serve; by default random weights of Pythia-70M's shape"
    )
    parser.add_argument("--parts", default="clients,leavers,prefixes")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few streams")
    parser.add_argument(
        "--dtype", default="auto", help="`default` gives the server no dtype: native fp32"
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
        options.new = 4
    return options


def main() -> None:
    """Measure, print, write JSON."""
    options = parse()
    parts = options.parts.split(",")
    record: dict[str, Any] = {
        "machine": describe(),
        "checkpoint": options.checkpoint or "random 70M shape, 8,192 tokens",
    }
    record |= {name: getattr(options, name) for name in ("dtype", "slots", "rounds", "new")}
    record["instructions"] = instructions()
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | TINY if options.quick else SHAPE
        model = options.checkpoint or str(write_model(Path(folder), shape))
        if "clients" in parts or "leavers" in parts:
            server = start(model, options, options.port)
            try:
                if "clients" in parts:
                    record["clients"] = measure(options.port, options)
                    show_clients(record["clients"])
                if "leavers" in parts:
                    record["leavers"] = measure_leavers(options.port, server, options.new)
                    print(f"{LEAVERS} disconnects: {record['leavers']}")
            finally:
                server.terminate()
                server.wait()
        if "prefixes" in parts:
            record["prefixes"] = measure_prefixes(model, options)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def show_clients(table: dict[str, Any]) -> None:
    """One line for each number of clients."""
    one = table["1"]["tokens_per_second"]["median"]
    for clients, row in table.items():
        speed = row["tokens_per_second"]["median"]
        print(
            f"{clients:>3} clients  {speed:7.0f} tok/s ({speed / one:.1f} x one client)"
            f"  first token p50 {row['first_token_p50'] * 1e3:.0f} ms,"
            f" p99 {row['first_token_p99'] * 1e3:.0f} ms"
            f"  whole p50 {row['whole_p50']:.2f} s, p99 {row['whole_p99']:.2f} s"
        )


if __name__ == "__main__":
    main()
