"""The server under bodies made to stop it: seconds, the latency of /health, growth of memory.

    python benchmarks/serving_bodies.py               # a small model, random weights
    python benchmarks/serving_bodies.py --only prompt --together 1

`castalia serve` runs in a process of its own. Each body is sent alone and several at once, while
another connection asks /health every 20 ms. Memory is that of the server and its workers, at its
peak during the request, above what it was before. A body passes if every /health took under 0.1 s
and memory grew by less than ten times the bodies, or by less than 64 MB beyond small ones.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from machine import describe
from serving import start, write_model

RESULTS = Path(__file__).parent / "results" / "serving_bodies.json"
SHAPE = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
TEMPLATE = """\
{%- for m in messages -%}
{%- for later in messages[loop.index0 + 1:] -%}{%- if later.role == 'none' -%}x{%- endif -%}
{%- endfor -%}<{{ m.role }}>{{ m.content }}</s>
{%- endfor -%}
{%- if times %}{{ padding * times }}{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
"""Reads every message once for each, as templates do that look for the last call of a tool, and
multiplies what the request gives it."""
MOST = 8 << 20
"""Bytes of the largest body."""
SLOWEST = 0.1
"""Seconds that /health may take."""
GROWTH = 10
"""Times the bodies that memory may grow."""
ALLOWANCE = 64 << 20
"""Bytes that memory may grow whatever the body: a worker that starts, buffers that fill once."""
COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
Body = Callable[[], bytes]


def filled(before: str, unit: str, after: str, size: int = MOST) -> bytes:
    """A body of `size` bytes that repeats `unit`."""
    encoded = unit.encode()
    times = (size - len(before.encode()) - len(after.encode())) // len(encoded)
    return before.encode() + encoded * times + after.encode()


def lists() -> Iterator[tuple[str, str, Body]]:
    """Name, path and body of a request as a control, and of long lists."""
    yield "a short prompt", COMPLETE, lambda: b'{"prompt":"a guest","max_tokens":16}'
    for size, name in ((MOST, ""), (585 << 10, ", 585 KiB")):
        yield (
            f"messages of numbers{name}",
            CHAT,
            lambda size=size: filled('{"messages":[', "0,", "0]}", size),
        )
    for unit, name in (
        ("0,", "numbers"),
        ("300,", "larger numbers"),
        ("1.5,", "fractions"),
        ('"",', "empty strings"),
        ('"ab",', "strings"),
        ("[1],", "lists"),
        ("[],", "empty lists"),
        ('{"a":0},', "objects"),
        ('1,"a",[1],{},', "a mixture"),
    ):
        last = unit.removesuffix(",").split(",")[0]
        yield (
            f"prompt of {name}",
            COMPLETE,
            lambda unit=unit, last=last: filled('{"prompt":[', unit, f"{last}]}}"),
        )
    fields = ("stop", "stop_token_ids", "allowed_token_ids", "guided_choice", "bad_words")
    for field in fields:
        unit = "1," if "ids" in field else '"a",'
        yield (
            f"{field}",
            COMPLETE,
            lambda field=field, unit=unit: filled(
                f'{{"prompt":"a","{field}":[', unit, f"{unit[:-1]}]}}"
            ),
        )
    served = ",".join(["[" + ",".join(["4000"] * 2000) + "]"] * 16)
    yield (
        "prompts that can be served",
        COMPLETE,
        lambda: f'{{"max_tokens":1,"prompt":[{served}]}}'.encode(),
    )
    for field in ("messages", "tools", "documents"):
        yield (
            f"{field} of small objects",
            CHAT,
            lambda field=field: filled(
                f'{{"messages":[{{"role":"user","content":"a"}}],"{field}":[',
                '{"role":"user"},',
                '{"role":"user"}]}',
            ),
        )


def objects() -> Iterator[tuple[str, str, Body]]:
    """Objects with many keys, deep values, long names and texts."""

    def keys(before: str, value: str, after: str) -> bytes:
        count = (MOST - len(before) - len(after)) // (len(value) + 11)
        return (before + ",".join(f'"{i:07}":{value}' for i in range(count)) + after).encode()

    yield (
        "logit_bias of many tokens",
        COMPLETE,
        lambda: keys('{"prompt":"a","logit_bias":{', "1", "}}"),
    )
    yield (
        "logit_bias of many errors",
        COMPLETE,
        lambda: keys('{"prompt":"a","logit_bias":{', '"a"', "}}"),
    )
    yield "unknown fields", COMPLETE, lambda: keys('{"prompt":"a",', "1", "}")
    yield "metadata", CHAT, lambda: keys('{"messages":[],"metadata":{', "1", "}}")
    yield (
        "template variables",
        CHAT,
        lambda: keys(
            '{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{', "1", "}}"
        ),
    )
    for unit, name in (("[", "lists"), ('{"a":', "objects")):
        yield f"deep {name}", COMPLETE, lambda unit=unit: filled('{"prompt":', unit, "")
    yield "a number of 8 MB", COMPLETE, lambda: filled('{"prompt":"a","n":', "1", "}")
    yield "name of a field", COMPLETE, lambda: filled('{"prompt":"a","', "stop_", '":1}')
    for path in (COMPLETE, CHAT, "/tokenize", "/detokenize"):
        rest = {
            COMPLETE: '"prompt":"a"',
            CHAT: '"messages":[{"role":"user","content":"a"}]',
            "/tokenize": '"prompt":"a"',
            "/detokenize": '"tokens":[1]',
        }[path]
        yield (
            f"name of a model at {path}",
            path,
            lambda rest=rest: filled(f'{{{rest},"model":"', "run", '"}'),
        )
    yield "role of a message", CHAT, lambda: filled('{"messages":[{"role":"', "a", '"}]}')
    yield (
        "type of a part",
        CHAT,
        lambda: filled('{"messages":[{"role":"user","content":[{"type":"', "a", '"}]}]}'),
    )
    yield "half a pair", COMPLETE, lambda: filled('{"prompt":"', "\\ud800", '"}')
    yield "escapes", COMPLETE, lambda: filled('{"prompt":"', "\\u0301", '"}')
    yield "not JSON", COMPLETE, lambda: filled("", "x", "")
    yield "blanks", COMPLETE, lambda: filled("", " ", '{"prompt":5}')
    yield "a stop string", COMPLETE, lambda: filled('{"prompt":"a","stop":"', "a", '"}')
    yield (
        "a regular expression",
        COMPLETE,
        lambda: filled('{"prompt":"a","guided_regex":"', "(a|b)", '"}'),
    )
    yield (
        "a schema",
        COMPLETE,
        lambda: keys(
            '{"prompt":"a","guided_json":{"type":"object","properties":{',
            '{"type":"string"}',
            "}}}",
        ),
    )
    yield (
        "a schema as text",
        COMPLETE,
        lambda: filled('{"prompt":"a","guided_json":"[', "0,", '0]"}'),
    )
    yield (
        "arguments of a call",
        CHAT,
        lambda: filled(
            '{"messages":[{"role":"assistant","tool_calls":[{"function":{"arguments":"',
            "[",
            '"}}]}]}',
        ),
    )


TEXTS = {
    "one word": "a",
    "blanks": " ",
    "combining marks": "\u0301",
    "digits": "7",
    "words": "the guest who came late ",
    "wide characters": "\U0001f375",
    "special tokens": "<|endoftext|>",
}


def texts() -> Iterator[tuple[str, str, Body]]:
    """Long texts to encode, ids to decode, conversations for a template."""
    for name, unit in TEXTS.items():
        for path, before, after in (
            ("/tokenize", '{"prompt":"', '"}'),
            (COMPLETE, '{"prompt":"', '"}'),
            (CHAT, '{"messages":[{"role":"user","content":"', '"}]}'),
        ):
            yield (
                f"{name} at {path}",
                path,
                lambda unit=unit, before=before, after=after: filled(before, unit, after),
            )
    yield "one wide character", "/tokenize", lambda: filled('{"prompt":"\U0001f375', "a", '"}')
    yield (
        "cut prompt",
        COMPLETE,
        lambda: filled('{"truncate_prompt_tokens":64,"max_tokens":1,"prompt":"', "a guest, ", '"}'),
    )
    for size, name in ((MOST, ""), (1 << 20, " of 1 MiB")):
        yield (
            f"detokenize{name}",
            "/detokenize",
            lambda size=size: filled('{"tokens":[', "300,", "300]}", size),
        )
    for size in (48 << 10, 1 << 20):
        yield (
            f"quadratic template, {size >> 10} KiB",
            CHAT,
            lambda size=size: filled('{"messages":[', '{"role":"u"},', '{"role":"u"}]}', size),
        )
    yield (
        "multiplying template",
        CHAT,
        lambda: (
            b'{"messages":[{"role":"u"}],"chat_template_kwargs":{"padding":"aaaa","times":1000000000}}'
        ),
    )


def answers() -> Iterator[tuple[str, str, Body]]:
    """Answers that are larger than what they answer."""

    def scored(count: int, top: int, **more: Any) -> bytes:
        prompt = [[300 + i % 5000 for i in range(2000)] for _ in range(count)]
        body = {"prompt": prompt, "echo": True, "logprobs": top, "max_tokens": 0}
        return json.dumps(body | more).encode()

    yield "scores of 1 prompt", COMPLETE, lambda: scored(1, 20)
    yield "scores of 24 prompts", COMPLETE, lambda: scored(24, 20)
    yield "scores of 256 prompts", COMPLETE, lambda: scored(256, 20)
    yield "scores in a stream", COMPLETE, lambda: scored(8, 20, stream=True)
    yield (
        "64 choices with scores",
        COMPLETE,
        lambda: json.dumps(
            {"prompt": "a", "n": 64, "logprobs": 20, "max_tokens": 100, "ignore_eos": True}
        ).encode(),
    )
    yield "best_of a million", COMPLETE, lambda: b'{"prompt":"a","best_of":1000000}'
    yield (
        "16 stop strings",
        COMPLETE,
        lambda: json.dumps(
            {
                "prompt": "a" * 100,
                "logit_bias": {"66": 100},
                "max_tokens": 1000,
                "stop": ["a" * (500_000 - i) for i in range(16)],
            }
        ).encode(),
    )


async def send(port: int, path: str, body: bytes) -> tuple[str, int, float]:
    """Status or what went wrong, bytes of the answer, seconds."""
    began = time.perf_counter()
    size = 0
    status = "closed"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        line = await asyncio.wait_for(reader.readline(), 120)
        status = line.decode().split(" ")[1] if line else "closed"
        while part := await asyncio.wait_for(reader.read(1 << 16), 120):
            size += len(part)
        writer.close()
    except (OSError, TimeoutError) as error:
        status = type(error).__name__
    return status, size, time.perf_counter() - began


async def watch_health(port: int, until: asyncio.Event) -> float:
    """The slowest answer of /health, in seconds, asked every 20 ms on one connection."""
    slowest = 0.0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not until.is_set():
        began = time.perf_counter()
        writer.write(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        await reader.readexactly(length)
        slowest = max(slowest, time.perf_counter() - began)
        await asyncio.sleep(0.02)
    writer.close()
    return slowest


def memory(process: psutil.Process) -> int:
    """Resident bytes of the server and its workers."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


async def watch_memory(process: psutil.Process, until: asyncio.Event) -> int:
    """The most resident bytes, looked at every 10 ms."""
    most = 0
    while not until.is_set():
        most = max(most, memory(process))
        await asyncio.sleep(0.01)
    return most


async def measure(
    port: int, process: psutil.Process, path: str, body: bytes, together: int
) -> dict[str, Any]:
    """One kind of body, `together` of them at once."""
    before = memory(process)
    done = asyncio.Event()
    health = asyncio.create_task(watch_health(port, done))
    most = asyncio.create_task(watch_memory(process, done))
    await asyncio.sleep(0.1)
    sent = await asyncio.gather(*(send(port, path, body) for _ in range(together)))
    await asyncio.sleep(0.05)
    done.set()
    grown = max(0, await most - before)
    bodies = len(body) * together
    slowest = await health
    return {
        "path": path,
        "bytes": len(body),
        "together": together,
        "statuses": sorted({status for status, _, _ in sent}),
        "answer_bytes": max(size for _, size, _ in sent),
        "seconds": round(max(seconds for _, _, seconds in sent), 3),
        "health": round(slowest, 3),
        "growth_mb": round(grown / 1e6, 1),
        "growth": round(grown / bodies, 1),
        "passes": slowest <= SLOWEST and grown < max(GROWTH * bodies, ALLOWANCE),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="measure bodies whose name has this")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Send every body, print a line for each, write JSON."""
    options = parse()
    machine = describe()
    print(f"{machine['cpu']}, {', '.join(machine['features'])}, {machine['cores']} cores")
    rows = {}
    settings = argparse.Namespace(dtype="auto", slots=16)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), SHAPE)
        (checkpoint,) = (model / "checkpoints").glob("step-*")
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        server = start(str(model), settings, options.port, queue=256)
        try:
            process = psutil.Process(server.pid)
            # Not counted: what the first requests of each kind load.
            for path, body in (
                (COMPLETE, b'{"prompt":"a","guided_regex":"ab","max_tokens":2}'),
                (CHAT, b'{"messages":[{"role":"user","content":"a"}],"max_tokens":1}'),
                ("/tokenize", filled('{"prompt":"', "a ", '"}', 100_000)),
            ):
                print("first", asyncio.run(send(options.port, path, body)))
            for kind in (lists, objects, texts, answers):
                for name, path, body in kind():
                    if options.only not in name:
                        continue
                    for together in options.together:
                        row = asyncio.run(measure(options.port, process, path, body(), together))
                        rows[f"{name} x {together}"] = row
                        print(
                            f"{'ok  ' if row['passes'] else 'FAIL'} {name[:34]:34} x {together}"
                            f" {'/'.join(row['statuses']):>8} {row['seconds']:7.2f} s"
                            f"  /health {row['health'] * 1e3:6.0f} ms"
                            f"  {row['growth_mb']:7.1f} MB = {row['growth']:.1f} x"
                            f"  answer {row['answer_bytes']:,}",
                            flush=True,
                        )
        finally:
            server.terminate()
            server.wait()
    failed = sum(not row["passes"] for row in rows.values())
    print(f"{len(rows) - failed} of {len(rows)} pass")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine, "bodies": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
