"""Gain and cost of several ranks: scaling, memory, pipelines, background saves.

    python benchmarks/distributed.py [--quick] [--shape 14m] [--seq 512] [--rows 8] [--gpu]
                                     [--json FILE]

On a CPU, engines with one thread per rank train the same batch, so two ranks have two cores and one
has one. One rank with two threads is the other way to use both cores. Engines step in turn, so that
disturbances of the machine affect all alike. Ratios are taken round by round; spreads are
quartiles. Memory is the peak resident size of a rank above that after the imports, the largest over
an engine's ranks. A background save stalls the loop while the state is copied. Its share refers to
a synchronous save, measured in turn with it.

With --gpu, on one GPU: FSDP2 on a mesh of one rank against the plain model, both compiled, bf16,
Pythia-410M.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, in_turn, ratio, summary

from castalia.data import IndexedDatasetWriter

HERE = Path(__file__).resolve().parent
PIPELINE = ("parallel.pp=2", "train.micro_batch_size={micro}")
ENGINES: dict[str, dict[str, Any]] = {
    "1 process": {"processes": 1, "options": ()},
    "1 process, 2 threads": {"processes": 1, "threads": 2, "options": ()},
    "FSDP2 alone": {"processes": 1, "sharded_alone": True, "options": ()},
    "FSDP2, 2 processes": {"processes": 2, "options": ()},
    "FSDP2 kept gathered, 2 processes": {
        "processes": 2,
        "options": ("parallel.reshard_after_forward=false",),
    },
    "replicas, 2 processes": {
        "processes": 2,
        "options": ("parallel.dp_replicate=2", "parallel.dp_shard=1"),
    },
    "1f1b, 2 processes": {"processes": 2, "options": PIPELINE},
    "interleaved, 2 processes": {
        "processes": 2,
        "options": (*PIPELINE, "parallel.schedule=interleaved_1f1b"),
    },
    "zero bubble, 2 processes": {
        "processes": 2,
        "options": (*PIPELINE, "parallel.schedule=zero_bubble"),
    },
}
GPU_ENGINES = {
    "1 process": {"processes": 1, "options": ("train.compile=true",)},
    "FSDP2 alone": {"processes": 1, "sharded_alone": True, "options": ("train.compile=true",)},
}
COMPARED = {
    "speed of two processes, against one process": ("1 process", "FSDP2, 2 processes"),
    "speed of two replicas, against one process": ("1 process", "replicas, 2 processes"),
    "speed of two stages, 1f1b, against one process": ("1 process", "1f1b, 2 processes"),
    "speed of two stages, interleaved, against one process": (
        "1 process",
        "interleaved, 2 processes",
    ),
    "speed of two stages, zero bubble, against one process": (
        "1 process",
        "zero bubble, 2 processes",
    ),
    "speed of two threads, against one process": ("1 process", "1 process, 2 threads"),
    "time of FSDP2 on one process, against plain": ("FSDP2 alone", "1 process"),
}
"""Description -> the engines whose times are divided, the first by the second."""


def main() -> None:
    """Measure, print a table, write JSON."""
    options = read_options()
    machine = describe("cuda" if options.gpu else "cpu")
    print(json.dumps(machine))
    with tempfile.TemporaryDirectory() as folder:
        base = base_options(options, Path(folder))
        engines = GPU_ENGINES if options.gpu else ENGINES
        running = {
            name: Engine(name, engine, base, Path(folder), options)
            for name, engine in engines.items()
        }
        # Allocators and compiled code settle first.
        for _ in range(options.warmup):
            for engine in running.values():
                engine.step()
        times = in_turn({name: engine.step for name, engine in running.items()}, options.rounds)
        memory = {
            name: max(answer["peak"] for answer in engine.ask("memory"))
            for name, engine in running.items()
        }
        saves = measure_saves(running["1 process"], options.rounds)
        for engine in running.values():
            engine.stop()
    result = {
        "shape": options.shape,
        "rows": options.rows,
        "seq": options.seq,
        "seconds": {name: summary(values) for name, values in times.items()},
        "peak_bytes": memory,
        "ratios": {
            words: ratio(times[a], times[b])
            for words, (a, b) in COMPARED.items()
            if {a, b} <= times.keys()
        },
        "save": saves,
    }
    print_table(result, options.rows * options.seq)
    machine["load_at_end"] = round(os.getloadavg()[0], 2)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds of short rows")
    parser.add_argument(
        "--gpu", action="store_true", help="on one GPU: FSDP2 and compile against plain, 410m"
    )
    parser.add_argument("--shape", help="a Pythia size, for instance 14m")
    parser.add_argument("--seq", type=int, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step, over all ranks")
    parser.add_argument("--rounds", type=int, help="timed steps of each engine")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    options.shape = options.shape or ("410m" if options.gpu else "14m")
    if options.seq is None:
        options.seq = 512
        if options.gpu:
            options.seq = 2048
        elif options.quick:
            options.seq = 128
    options.rounds = options.rounds or (3 if options.quick else 15)
    options.warmup = 1 if options.quick else 3
    name = "distributed-gpu.json" if options.gpu else "distributed.json"
    options.json = options.json or HERE / "results" / name
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch sees none")
    return options


def base_options(options: argparse.Namespace, folder: Path) -> list[str]:
    """The config shared by all engines; the data are random tokens."""
    random = np.random.default_rng(0)
    # Random tokens cost as much as text; no corpus is needed.
    with IndexedDatasetWriter(folder / "tokens", "uint16") as writer:
        for _ in range(64):
            writer.add(random.integers(0, 50000, 4096))
    return [
        f"pythia-{options.shape}",
        f"data.train={folder / 'tokens'}",
        "data.tokenizer=null",
        f"data.seq_length={options.seq}",
        f"train.batch_size={options.rows}",
        "train.micro_batch_size=null",
        "train.steps=100000",
        f"device={'cuda' if options.gpu else 'cpu'}",
        f"precision={'bf16' if options.gpu else 'fp32'}",
    ]


class Engine:
    """The ranks of one engine, which all execute the same word."""

    def __init__(
        self, name: str, engine: dict[str, Any], base: list[str], folder: Path, options: Any
    ) -> None:
        self.name = name
        size = engine["processes"]
        chosen = [text.format(micro=max(1, options.rows // 4)) for text in engine["options"]]
        case = {
            "options": [*base, *chosen, f"output={folder / name.replace(' ', '-')}"],
            "threads": engine.get("threads", 1),
            "sharded_alone": engine.get("sharded_alone", False),
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
                "WORLD_SIZE": str(size),
            }
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.processes = [
            self.start(case, place | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(size)
        ]
        self.answers()

    def start(self, case: dict[str, Any], place: dict[str, str]) -> subprocess.Popen[str]:
        """One process."""
        environment = os.environ | place | {"OMP_NUM_THREADS": str(case["threads"])}
        command = [sys.executable, str(HERE / "distributed_engines.py"), json.dumps(case)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment
        )

    def answers(self) -> list[Any]:
        """One line of each rank; if one died, exit with the end of the log."""
        lines = []
        for process in self.processes:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                self.log.seek(0)
                raise SystemExit(f"{self.name} stopped: {self.log.read()[-2000:]}")
            lines.append(json.loads(line))
        return lines

    def ask(self, word: str) -> list[Any]:
        """Send a word to all ranks and wait for all answers."""
        self.tell(word)
        return self.answers()

    def tell(self, word: str) -> None:
        """Send a word to all ranks."""
        for process in self.processes:
            assert process.stdin is not None
            print(word, file=process.stdin, flush=True)

    def step(self) -> float:
        """Seconds of one step on its slowest rank."""
        return max(self.ask("step"))

    def stop(self) -> None:
        """End all ranks."""
        self.tell("stop")
        for process in self.processes:
            process.wait()


def measure_saves(engine: Engine, rounds: int) -> dict[str, dict[str, float]]:
    """Stall of a background save as a share of a synchronous one, and both in seconds."""
    answers: dict[str, list[dict[str, float]]] = {"save": [], "save_behind": []}
    # The first background save allocates the memory for copies, which is kept.
    engine.ask("save_behind")

    def ask(word: str) -> float:
        answers[word] += engine.ask(word)
        return answers[word][-1]["stall"]

    stalls = in_turn({word: partial(ask, word) for word in answers}, rounds)
    return {
        "stall_share": ratio(stalls["save_behind"], stalls["save"]),
        "synchronous_seconds": summary(stalls["save"]),
        "stall_seconds": summary(stalls["save_behind"]),
        "background_seconds": summary(answer["total"] for answer in answers["save_behind"]),
    }


def print_table(result: dict[str, Any], tokens: int) -> None:
    """Times and memory by engine, then the ratios."""
    print(f"\nPythia-{result['shape']}, {result['rows']} x {result['seq']} tokens a step")
    print(f"{'engine':<34}{'ms a step':>11}{'spread':>16}{'tokens/s':>10}{'peak MB a rank':>19}")
    for name, time in result["seconds"].items():
        low, middle, high = (time[key] * 1e3 for key in ("low", "median", "high"))
        peak = result["peak_bytes"][name] / 1e6
        print(
            f"{name:<34}{middle:>11.1f}{low:>8.1f}..{high:<6.1f}{tokens / time['median']:>10,.0f}"
            f"{peak:>19,.0f}"
        )
    for words, r in result["ratios"].items():
        print(f"{words + ':':<60}{r['median']:.2f} ({r['low']:.2f}..{r['high']:.2f})")
    memory = result["peak_bytes"]
    if "replicas, 2 processes" in memory:
        share = memory["FSDP2, 2 processes"] / memory["replicas, 2 processes"]
        print(f"peak memory of a rank, FSDP2 against replicas: {share:.2f}")
    save = result["save"]
    share = save["stall_share"]
    print(
        f"a background save stalls for {save['stall_seconds']['median'] * 1e3:.0f} ms,"
        f" {share['median']:.1%} ({share['low']:.1%}..{share['high']:.1%}) of the"
        f" {save['synchronous_seconds']['median'] * 1e3:.0f} ms of a synchronous one;"
        f" it is complete after {save['background_seconds']['median'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
