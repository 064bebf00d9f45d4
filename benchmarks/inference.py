"""Decoding and scoring of Pythia's and LLaMA's shapes on a CPU, against other engines.

    python benchmarks/inference.py      # 70M and 160M, batch 1 and 8; run it on an idle machine
    python benchmarks/inference.py --family llama      # LLaMA's blocks, 12 and 4 key heads
    python benchmarks/inference.py --sizes tiny --rounds 2 --new 8
    python benchmarks/inference.py --gpu      # see benchmarks/inference_gpu.py
    python benchmarks/inference.py --level avx2        # 70M as on a machine with AVX2 alone
    python benchmarks/inference.py --quick             # one round of few engines

Compares the native engine with transformers, CTranslate2, llama.cpp and OpenVINO. Weights are
random and the same for all. Every engine has a process of its own, and all engines take their turn
in each round. Decoding: prompts of 32 random tokens, 128 new tokens, greedy, without an end of
document. Memory is the peak resident size minus that after the imports. The share of the memory
limit is the bytes of weights that a token reads times the steps a second, over the rate at which
castalia.machine measures that memory is read, anew in every round and from a buffer that no cache
holds; weights of which a part stays in the last cache can exceed it. First tokens are timed for
prompts of 128, 512 and 2,000 tokens and a mixed batch of eight. `native auto` is what dtype=auto
takes. CTranslate2 and llama.cpp use the number of threads that suits them best. Goals are ratios of
medians, printed at the end.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import inference_gpu
import torch
from inference_levels import MIXED, PREFILL, describe_kernels, level_goals
from levels import LEVELS, enter
from machine import describe, in_turn, ratio, summary

from castalia.machine.measuring import memory_rate


class Shape(NamedTuple):
    """The sizes of a model."""

    layers: int
    width: int
    heads: int
    tokens: int
    kv_heads: int | None = None
    inner: int | None = None

    def config(self, family: str) -> dict[str, Any]:
        """The model section of a config."""
        sizes = {
            "family": family,
            "num_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "vocab_size": self.tokens,
            "num_kv_heads": self.kv_heads,
            "intermediate_size": self.inner,
        }
        return {name: value for name, value in sizes.items() if value is not None}


SHAPES = {
    "neox": {
        "70m": Shape(6, 512, 8, 50277),
        "160m": Shape(12, 768, 12, 50277),
        "410m": Shape(24, 1024, 16, 50277),
        "tiny": Shape(2, 64, 4, 1000),
    },
    "llama": {
        "160m": Shape(12, 768, 12, 32000, inner=3072),
        "160m-gqa": Shape(12, 768, 12, 32000, kv_heads=4, inner=3072),
        "tiny": Shape(2, 64, 4, 1000, kv_heads=2, inner=192),
    },
}
"""Layers, width and heads from Biderman et al. 2023, arXiv:2304.01373, table 1. LLaMA's have the
same width and depth, its gated MLP and its vocabulary: 162 million parameters."""
SIZES = {"neox": "70m,160m", "llama": "160m,160m-gqa"}
"""What is measured by default."""
SCORED = 2048
RESULTS = Path(__file__).parent / "results"
EXPORTS = {
    "transformers fp32": ("hf", "fp32"),
    "transformers bf16": ("hf", "fp32"),
    "ct2 float32": ("ct2", "float32"),
    "ct2 int8": ("ct2", "int8"),
    "llama.cpp Q8_0": ("gguf", "Q8_0"),
    "llama.cpp Q4_0": ("gguf", "Q4_0"),
    "openvino int8": ("hf", "int8"),
    "native fp32": ("native", "fp32"),
    "native bf16": ("native", "bf16"),
    "native int8": ("native", "int8"),
    "native int4": ("native", "int4"),
    "native auto": ("native", "int8"),
}
"""Engine -> format and numbers of the export that it reads."""
NEEDS = {
    "ct2": "ctranslate2",
    "openvino": "openvino",
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
}
BITS = {"fp32": 32, "bf16": 16, "float32": 32, "int8": 8, "Q8_0": 8.5, "Q4_0": 4.5, "int4": 4.5}
SCORERS = (
    "transformers fp32",
    "transformers bf16",
    "ct2 float32",
    "ct2 int8",
    "openvino int8",
    "native fp32",
    "native bf16",
    "native int8",
    "native auto",
)
"""Engines that score."""
QUICK = (
    "transformers fp32",
    "transformers bf16",
    "ct2 int8",
    "llama.cpp Q8_0",
    "native fp32",
    "native int8",
    "native auto",
)
"""Engines of `--quick`."""
GOALS = {
    "neox": [
        ("native int8", "ct2 int8", 1, 3.5),
        ("native int8", "llama.cpp Q8_0", 1, 1.2),
        ("native int8", "ct2 int8", 8, 3.0),
        ("native int4", "llama.cpp Q4_0", 1, 1.0),
        ("native int4", "llama.cpp Q4_0", 8, 1.0),
    ],
    "llama": [
        (ours, theirs, batch, 1.0)
        for batch in (1, 8)
        for ours, theirs in (
            ("native int8", "ct2 int8"),
            ("native int8", "llama.cpp Q8_0"),
            ("native int8", "transformers bf16"),
            ("native int4", "llama.cpp Q4_0"),
        )
    ],
}
"""Castalia's engine, the other, batch, required ratio of tokens a second."""


class Worker:
    """The process of one engine, as seen from the parent."""

    def __init__(self, engine: str, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("inference_engines.py")
        command = [sys.executable, str(script), engine, str(folder), str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.engine = engine
        self.peak = 0
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; other lines are prints of libraries."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the process of {self.engine} exited")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.peak = max(self.peak, answer["peak"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def write_models(
    family: str, size: str, folder: Path, engines: list[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write random weights of a shape as a Hugging Face folder, and the exports of the engines.

    Returns  the folder of each engine, and of those that cannot have one, the reason.
    """
    from tokenizers import Tokenizer, models

    from castalia.checkpoint.hf import write_hf
    from castalia.core.errors import ConfigError
    from castalia.distributed import initialize
    from castalia.export import export
    from castalia.models import Decoder
    from castalia.models.families import build_model_config
    from castalia.models.init import start_weights

    shape = SHAPES[family][size]
    config = build_model_config(shape.config(family), "benchmarks/inference.py")
    model = Decoder(config)
    initialize(model, start_weights(model.config, 1234))
    hf = folder / size / "hf"
    hf.mkdir(parents=True)
    write_hf(hf, model.state_dict(), config, end_ids=(0,), dtype="fp32")
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, shape.tokens)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(hf / "tokenizer.json"))
    places = {}
    refused = {}
    for engine in engines:
        to, numbers = EXPORTS[engine]
        place = hf if to == "hf" else folder / size / f"{to}-{numbers}"
        try:
            if not place.exists():
                list(export(hf, to=to, quantization=numbers, output=place))
        except ConfigError as error:
            refused[engine] = str(error)
            continue
        places[engine] = place
    return places, refused


def weight_bytes(folder: Path) -> int:
    """Size of an export's weights on disk."""
    endings = (".safetensors", ".bin", ".gguf")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in endings)


def token_bytes(family: str, size: str, engine: str) -> float:
    """Bytes of weights that one token reads: all matrices but the input embedding."""
    shape = SHAPES[family][size]
    width = shape.width
    numbers = EXPORTS[engine][1]
    if "bf16" in engine:
        numbers = "bf16"
    heads = 1 + (shape.kv_heads or shape.heads) / shape.heads
    inner = shape.inner or 4 * width
    matrices = 3 if family == "llama" else 2
    block = 2 * heads * width * width + matrices * width * inner
    rows = -(-shape.tokens // 128) * 128
    return (shape.layers * block + rows * width) * BITS[numbers] / 8


def prompts_of(batch: int, tokens: int, family: str, size: str) -> list[list[int]]:
    """Random prompts."""
    high = min(50000, SHAPES[family][size].tokens)
    return torch.randint(
        1, high, (batch, tokens), generator=torch.Generator().manual_seed(batch)
    ).tolist()


def measure_decoding(
    workers: Mapping[str, Worker], size: str, batch: int, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Tokens a second, time to the first token and share of the memory limit of every engine."""
    family = options.family
    prompts = prompts_of(batch, options.prompt, family, size)
    works: dict[str, Callable[[], float]] = {}
    for name, worker in workers.items():
        worker.ask(prompts=prompts, new=options.new)
        works[name] = lambda worker=worker: worker.ask(prompts=prompts, new=options.new)["seconds"]
        works[f"{name} first"] = lambda worker=worker: worker.ask(prompts=prompts, new=1)["seconds"]
        read = token_bytes(family, size, name)
        works[f"{name} memory"] = lambda read=read: read / memory_rate()
    times = in_turn(works, options.rounds)
    out = {}
    for name in workers:
        whole = times[name]
        first = times[f"{name} first"]
        steps = [(a - b) / (options.new - 1) for a, b in zip(whole, first, strict=True)]
        limit = times[f"{name} memory"]
        out[name] = {
            "tokens_per_second": summary(batch * options.new / t for t in whole),
            "first_token_seconds": summary(first),
            "step_seconds": summary(steps),
            "share_of_memory_limit": summary(a / b for a, b in zip(limit, steps, strict=True)),
            "rounds": whole,
        }
    return out


def measure_prefill(
    workers: Mapping[str, Worker], size: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Seconds to the first token of every engine, by prompt."""
    rows = {}
    for tokens in options.prefill:
        rows[f"{tokens} tokens"] = prompts_of(1, tokens, options.family, size)
    longest = prompts_of(len(MIXED), max(MIXED), options.family, size)
    mixed = [ids[:tokens] for ids, tokens in zip(longest, MIXED, strict=True)]
    rows[f"{len(MIXED)} prompts of {min(MIXED)} to {max(MIXED)} tokens"] = mixed
    found = {}
    for name, prompts in rows.items():
        works: dict[str, Callable[[], float]] = {}
        for engine, worker in workers.items():
            worker.ask(prompts=prompts, new=1)
            works[engine] = lambda worker=worker, prompts=prompts: worker.ask(
                prompts=prompts, new=1
            )["seconds"]
        times = in_turn(works, options.rounds)
        found[name] = {
            engine: {"seconds": summary(rounds), "rounds": rounds}
            for engine, rounds in times.items()
        }
    return found


def show_prefill(found: Mapping[str, Any], size: str) -> None:
    """Print a table: milliseconds."""
    print(f"\n{size}, ms to the first token")
    print(f"{'engine':<20}" + "".join(f"{name:>34}" for name in found))
    for engine in next(iter(found.values()), {}):
        cells = [1e3 * rows[engine]["seconds"]["median"] for rows in found.values()]
        print(f"{engine:<20}" + "".join(f"{cell:>34.1f}" for cell in cells))


def measure_scoring(
    workers: Mapping[str, Worker], size: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Seconds for SCORED tokens, and the sum of their log-probabilities."""
    (ids,) = prompts_of(1, SCORED, options.family, size)
    sums = {name: worker.ask(ids=ids)["sum"] for name, worker in workers.items()}
    works = {
        name: lambda worker=worker: worker.ask(ids=ids)["seconds"]
        for name, worker in workers.items()
    }
    rounds_of = in_turn(works, options.rounds)
    return {
        name: {
            "seconds": summary(times),
            "sum": sums[name],
            "peak": workers[name].peak,
            "rounds": times,
        }
        for name, times in rounds_of.items()
    }


def show_decoding(found: Mapping[str, Any], size: str, batch: int) -> None:
    """Print a table."""
    print(f"\n{size}, batch {batch}")
    print(f"{'engine':<20}{'tok/s':>9}{'spread':>16}{'first ms':>10}{'ms/step':>9}{'of limit':>10}")
    for name, row in found.items():
        rate = row["tokens_per_second"]
        first = 1e3 * row["first_token_seconds"]["median"]
        step = 1e3 * row["step_seconds"]["median"]
        spread = f"{rate['low']:.0f}-{rate['high']:.0f}"
        share = row["share_of_memory_limit"]["median"]
        print(
            f"{name:<20}{rate['median']:>9.1f}{spread:>16}{first:>10.2f}{step:>9.3f}{share:>10.0%}"
        )


def show_scoring(found: Mapping[str, Any], size: str) -> None:
    """Print a table."""
    print(f"\n{size}, scoring {SCORED} tokens")
    base = found.get("transformers fp32")
    for name, row in found.items():
        times = ""
        if base:
            times = f"{ratio(base['rounds'], row['rounds'])['median']:.2f}x"
        milliseconds = 1e3 * row["seconds"]["median"]
        megabytes = row["peak"] / 1e6
        print(
            f"{name:<20}{milliseconds:>9.0f} ms {times:>8}  {megabytes:>6.0f} MB  {row['sum']:.2f}"
        )


def goals(record: Mapping[str, Any], family: str, size: str) -> list[dict[str, Any]]:
    """Required and measured ratios."""
    measured = []
    for ours, theirs, batch, wanted in GOALS[family]:
        rows = record["decoding"].get(str(batch), {})
        if ours in rows and theirs in rows:
            got = ratio(rows[theirs]["rounds"], rows[ours]["rounds"])
            measured.append(
                {"what": f"{size} batch {batch}: {ours} / {theirs}", "wanted": wanted, **got}
            )
    scoring = record.get("scoring", {})
    if "native auto" in scoring and size == "70m":
        share = 0.5e9 / scoring["native auto"]["peak"]
        what = "70m scoring: 0.5 GB / native auto's memory"
        measured.append({"what": what, "wanted": 1.0, "median": share})
    memory = record["memory"]
    if "native int8" in memory and "ct2 int8" in memory:
        for kind in memory["ct2 int8"]:
            share = memory["ct2 int8"][kind] * 1.2 / memory["native int8"][kind]
            measured.append(
                {
                    "what": f"{size} {kind}: 1.2 x ct2 int8 / native int8, memory",
                    "wanted": 1.0,
                    "median": share,
                }
            )
    return measured


def show_goals(found: list[dict[str, Any]]) -> None:
    """One line a goal."""
    print("\ngoals")
    for goal in found:
        state = "reached" if goal["median"] >= goal["wanted"] else "NOT reached"
        spread = f" ({goal['low']:.2f}-{goal['high']:.2f})" if "low" in goal else ""
        print(f"  {goal['what']}: {goal['median']:.2f}{spread}, wanted {goal['wanted']:g}: {state}")


def run_size(size: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one shape."""
    places, refused = write_models(options.family, size, folder, options.engines)
    for name, reason in refused.items():
        print(f"{size}: {name} is left out: {reason}")
    workers = {name: Worker(name, place, options.threads) for name, place in places.items()}
    record: dict[str, Any] = {
        "instructions": options.kernels["instructions"],
        "disk_bytes": {name: weight_bytes(place) for name, place in places.items()},
        "threads": {name: worker.hello["threads"] for name, worker in workers.items()},
        "scores_in": {name: worker.hello["scores_in"] for name, worker in workers.items()},
        "refused": refused,
        "decoding": {},
        "memory": {name: {} for name in workers},
    }
    try:
        for batch in options.batches:
            decoding = measure_decoding(workers, size, batch, options)
            record["decoding"][str(batch)] = decoding
            for name, worker in workers.items():
                record["memory"][name][f"batch {batch}"] = worker.peak
            show_decoding(decoding, f"{size} at {options.words}", batch)
        record["prefill"] = measure_prefill(workers, size, options)
        show_prefill(record["prefill"], f"{size} at {options.words}")
    finally:
        for worker in workers.values():
            worker.close()
    print(
        f"\n{'engine':<20}{'disk MB':>9}"
        + "".join(f"{f'MB batch {batch}':>13}" for batch in options.batches)
    )
    for name in workers:
        cells = "".join(f"{peak / 1e6:>13.0f}" for peak in record["memory"][name].values())
        print(f"{name:<20}{record['disk_bytes'][name] / 1e6:>9.1f}{cells}")
    scorers = {
        name: Worker(name, places[name], options.threads) for name in places if name in SCORERS
    }
    try:
        record["scoring"] = measure_scoring(scorers, size, options)
    finally:
        for worker in scorers.values():
            worker.close()
    show_scoring(record["scoring"], f"{size} at {options.words}")
    record["goals"] = goals(record, options.family, size) + level_goals(record, size)
    show_goals(record["goals"])
    return record


def available(engine: str) -> bool:
    """Whether the engine's package is installed."""
    module = NEEDS.get(engine.split()[0])
    return module is None or importlib.util.find_spec(module) is not None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="neox", choices=SHAPES)
    known = "; ".join(f"{family}: {', '.join(shapes)}" for family, shapes in SHAPES.items())
    parser.add_argument("--sizes", help=known)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--engines")
    parser.add_argument("--rounds", type=int, help="7; 3 with --level, 1 with --quick")
    parser.add_argument("--level", choices=LEVELS, help="instructions of all engines; 70m alone")
    parser.add_argument("--quick", action="store_true", help="70m, few engines, one round")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, help="128; 64 with --level, 16 with --quick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    options = parser.parse_args()
    short = options.quick or options.level is not None
    smallest = SIZES[options.family].split(",")[0]
    options.sizes = options.sizes or (smallest if short else SIZES[options.family])
    ending = "" if options.family == "neox" else f"-{options.family}"
    if options.level is not None:
        ending += f"-{options.level}"
    if not options.quick:
        # A quick run is too noisy to be kept, unless it is asked for.
        options.output = options.output or str(RESULTS / f"inference{ending}.json")
    options.level = options.level or "as-is"
    usual = (128, 7)
    if short:
        usual = (16, 1) if options.quick else (64, 3)
    options.new = options.new or usual[0]
    options.rounds = options.rounds or usual[1]
    options.prefill = PREFILL[:2] if options.quick else PREFILL
    options.engines = options.engines or ",".join(QUICK if options.quick else EXPORTS)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    wanted = options.engines.split(",")
    options.engines = [name for name in wanted if available(name)]
    options.missing = [name for name in wanted if not available(name)]
    return options


def main() -> None:
    """Measure, print, write JSON."""
    if "--gpu" in sys.argv:
        # Other engines, other peers, and options of its own.
        inference_gpu.main([word for word in sys.argv[1:] if word != "--gpu"])
        return
    options = parse()
    torch.set_num_threads(options.threads)
    enter(options.level)
    options.kernels = describe_kernels(options.level)
    options.words = options.kernels["words"]
    print(f"level {options.level}: {options.words}", flush=True)
    record: dict[str, Any] = {
        "machine": describe(),
        **options.kernels,
        "missing": options.missing,
        "sizes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            record["sizes"][size] = run_size(size, Path(folder), options)
    if options.missing:
        print(f"\nnot installed: {', '.join(options.missing)}")
    if options.output is None:
        return
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
