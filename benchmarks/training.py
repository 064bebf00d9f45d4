"""Speed and memory of a training step against other libraries' models of the same family.

    python benchmarks/training.py [--level as-is|avx2|no-compiler|torch-only] [--quick]
                                  [--family neox|llama] [--shapes 14m,70m]
                                  [--seq 512,2048] [--dtypes bf16,fp32]
                                  [--engines "castalia compiled,litgpt compiled"] [--prepare]
                                  [--products auto|torch|onednn] [--gpu] [--json FILE]

Pythia's shapes in fp32 and under bf16 autocast, each a row with a goal of its own; as LLaMA they
have RMSNorm, SwiGLU of 8/3 the width, serial blocks, and half as many heads of keys as of queries.
The JSON is written after every row, so that a run that is cut keeps what it has. Most of the time
is compiling, whose results torch keeps on disk: `--prepare` compiles for all rows and times
nothing, and the run after it takes about ten minutes on two cores, a minute or more a row.
Every engine runs in a process of its own and all step in turn, so that disturbances of the machine
affect all alike. All have fp32 weights, fused AdamW, the same batch and no clipping. The peers are
transformers' model, eager and compiled, litgpt's GPT under its chunked cross-entropy, and
torchtitan's chunked loss over transformers' blocks, the last two compiled; a peer that cannot be
imported is named as missing (`pip install --no-deps litgpt lightning lightning-utilities
torchmetrics jsonargparse typeshed-client docstring-parser torchtitan spmd_types tyro`, best with
`--target` and PYTHONPATH). Ratios are taken round by round; `low` and `high` are quartiles. Memory
is the peak resident size of a process, libraries included. `--allocator` adds transformers compiled
under Castalia's allocator settings, which shows how much of the ratio these alone give.

bf16 has no rows where its products have less than a fifth of the rate of fp32. At a
level without a compiler all engines are eager, because torch.compile needs one on a CPU; elsewhere
eager engines, which are slower than compiled ones, run where `--engines` names them.

FLOPs of a token are 6 N + 12 L d T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): N weights
in matrix products (head included, embedding not), L layers of width d, rows of T tokens. Shares
refer to the rate of one square product in the row's dtype, by the faster library, on the same
machine in the same run. The part `attention`, which is all between the projections, counts with the
half of its products that a causal row needs.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from levels import LEVELS, describe_level, enter, has_compiler, instructions, results_file
from machine import describe, in_turn, matrix_rate, ratio, summary
from worker import Worker

from castalia.machine import this_machine
from castalia.models import TransformerConfig, build_model_config
from castalia.models.families import family_of
from castalia.models.flops import flops_per_token
from castalia.monitor import peak_flops
from castalia.recipes.pythia import SIZES, TOKENIZER_IDS, model
from castalia.runs.machine_products import faster_library

HERE = Path(__file__).resolve().parent
ROWS = {("14m", 512): 8, ("70m", 512): 2, ("14m", 2048): 2}
"""Rows of T tokens in a step on a CPU; 1 for other cases. A step takes a second or two."""
GPU_ROWS = {"160m": 16, "410m": 16, "1.4b": 8}
ENGINES = {
    "castalia compiled": ("castalia", True, True),
    "castalia eager": ("castalia", False, True),
    "transformers compiled": ("transformers", True, False),
    "transformers eager": ("transformers", False, False),
    "litgpt compiled": ("litgpt", True, False),
    "litgpt eager": ("litgpt", False, False),
    "torchtitan's loss compiled": ("torchtitan", True, False),
    "torchtitan's loss eager": ("torchtitan", False, False),
    "transformers compiled, our allocator": ("transformers", True, True),
}
"""Name -> library, whether compiled, whether freed memory stays with the process."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOPELESS = {"bf16": 0.2, "fp32": 0.1}
"""A dtype whose products have less than this share of the other's rate is not run."""
GOAL = 1.3
"""Times the speed of transformers compiled, in the dtype that is faster on the machine."""
GOAL_ELSEWHERE = 1.0
"""In the other dtype."""
ROUNDS = (2, 9)
"""Rounds of a case, at least and at most."""
SECONDS = 10.0
"""Time of the rounds of a case."""
WORKERS: dict[str, Worker] = {}
"""The engines that run. Each has imported its library, which takes longer than a small case."""


class Case(NamedTuple):
    """One table: a shape in one dtype, and who runs it."""

    shape: str
    seq: int
    rows: int
    dtype: str
    engines: tuple[str, ...]


def main() -> None:
    """Run every case, print a table and write the JSON after each."""
    options = read_options()
    enter(options.level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Each table as it is ready, in a file too.
        sys.stdout.reconfigure(line_buffering=True)
    device = "cuda" if options.gpu else "cpu"
    machine = describe(device) | describe_level(options.level)
    rates = {name: best_rate(name, device) for name in options.dtypes}
    machine["matrix_gflops"] = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    machine["missing"] = missing_engines()
    print(json.dumps(machine))
    for name in machine["missing"]:
        print(f"{name} is not installed here, and its rows are missing")
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    peak = peak_flops(torch.device(device))
    for case in cases(options, rates):
        if options.prepare:
            prepare(case, values_of(case, device, options))
            continue
        results.append(run_case(case, device, options))
        for engine in results[-1]["engines"].values():
            speed = engine["tokens_per_second"]["median"]
            engine["mfu"] = peak and speed * results[-1]["flops_per_token"] / peak
        print_case(results[-1], rates[case.dtype], peak)
        machine["seconds"] = round(time.perf_counter() - began)
        write(options.json, {"machine": machine, "cases": results, "goals": judge(results)})
    if results:
        print_judgement(judge(results))
        print(f"\n{machine['seconds']} s; {options.json}")


def write(path: Path, numbers: dict[str, Any]) -> None:
    """The numbers so far, in place of those before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # By a rename: whoever stops the run finds a whole file.
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(numbers, indent=1) + "\n")
    fresh.replace(path)


def prepare(case: Case, values: dict[str, Any]) -> None:
    """Compile what the engines of a case need; torch keeps it on disk."""
    began = time.perf_counter()
    stop(start(tuple(name for name in case.engines if ENGINES[name][1]), values))
    took = time.perf_counter() - began
    print(f"{case.shape}, T {case.seq}, {case.dtype}: compiled in {took:.0f} s")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="14m at T = 512 in the faster dtype, compiled engines"
    )
    parser.add_argument("--level", choices=LEVELS, default="as-is", help="instructions, compiler")
    parser.add_argument("--gpu", action="store_true", help="on CUDA: 160m, 410m, 1.4b at T = 2048")
    parser.add_argument("--family", choices=("neox", "llama"), default="neox")
    parser.add_argument("--shapes", type=comma, help="Pythia sizes, for instance 14m,70m")
    parser.add_argument(
        "--seq", type=lambda text: [int(t) for t in text.split(",")], help="row lengths T"
    )
    parser.add_argument("--dtypes", type=comma, help="of bf16,fp32")
    parser.add_argument("--engines", type=comma, help=f"of {', '.join(ENGINES)}")
    parser.add_argument(
        "--products",
        choices=("auto", "torch", "onednn"),
        default="auto",
        help="library of Castalia's products in fp32, as train.products",
    )
    parser.add_argument("--prepare", action="store_true", help="compile for all rows, time nothing")
    parser.add_argument("--allocator", action="store_true", help="one more engine of transformers")
    parser.add_argument("--rounds", type=int, help="timed steps of each engine")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    sizes = ["14m"] if options.quick else ["14m", "70m"]
    options.shapes = options.shapes or (["160m", "410m", "1.4b"] if options.gpu else sizes)
    if options.seq is None:
        options.seq = [512] if options.quick else [512, 2048]
    if options.gpu:
        options.seq = [2048]
    options.dtypes = options.dtypes or (["bf16"] if options.gpu else ["bf16", "fp32"])
    name = "training" if options.family == "neox" else f"training-{options.family}"
    level = "gpu" if options.gpu else options.level
    options.json = options.json or results_file(HERE / "results", name, level)
    for given, known in (
        (options.shapes, SIZES),
        (options.dtypes, DTYPES),
        (options.engines or (), ENGINES),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; choose of {', '.join(known)}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch sees none")
    return options


def comma(text: str) -> list[str]:
    """Words between commas."""
    return text.split(",")


def best_rate(dtype: str, device: str) -> float:
    """FLOP/s of a square product by the faster library."""
    if device == "cuda":
        return matrix_rate(DTYPES[dtype], device)
    known = this_machine().rate(dtype, 512)
    # A square product may take minutes where a dtype has no instructions.
    slow = known < HOPELESS[dtype] * this_machine().rate("fp32", 512)
    return known if slow else max(known, matrix_rate(DTYPES[dtype], device))


def missing_engines() -> list[str]:
    """Peers that cannot be imported here."""
    names = {"transformers": "transformers", "litgpt": "litgpt", "torchtitan": "torchtitan"}
    return [name for name, module in names.items() if find_spec(module) is None]


def cases(options: argparse.Namespace, rates: dict[str, float]) -> Iterator[Case]:
    """What is run, the faster dtype first."""
    fastest = max(rates, key=lambda name: rates[name])
    order = sorted(rates, key=lambda name: -rates[name])
    for dtype in order:
        if rates[dtype] < HOPELESS[dtype] * rates[fastest]:
            factor = rates[fastest] / rates[dtype]
            print(f"{dtype} is left out: its products take {factor:.0f} times as long here")
            continue
        if options.quick and dtype != fastest:
            continue
        for seq in options.seq:
            for shape in options.shapes:
                rows = GPU_ROWS.get(shape, 8) if options.gpu else ROWS.get((shape, seq), 1)
                yield Case(shape, seq, rows, dtype, engines_of(options))


def engines_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Who runs: compiled engines, which are faster than eager ones, where there is a compiler."""
    absent = set(missing_engines())
    names = []
    for name, (library, compiled, _) in ENGINES.items():
        if options.engines is not None:
            wanted = name in options.engines
        elif "our allocator" in name:
            wanted = options.allocator
        else:
            wanted = compiled == has_compiler()
        if wanted and library not in absent:
            names.append(name)
    return tuple(names)


def config_of(shape: str, family: str) -> TransformerConfig:
    """A Pythia size, or a LLaMA of its layers, width and heads."""
    values = model(SIZES[shape], "bf16")
    if family == "llama":
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        heads = values["num_attention_heads"]
        values = {name: values[name] for name in sizes}
        values |= {"family": "llama", "num_kv_heads": heads // 2}
    config = build_model_config(values, "a benchmark")
    assert isinstance(config, TransformerConfig)
    return config


def run_case(one: Case, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """All engines at one shape, in turn."""
    config = config_of(one.shape, options.family)
    workers = start(one.engines, values_of(one, device, options))
    steps = {name: partial(worker.ask, "step") for name, worker in workers.items()}
    began = time.perf_counter()
    in_turn(steps, 1)
    least, most = ROUNDS
    fitting = int(SECONDS / (time.perf_counter() - began))
    rounds = options.rounds or (2 if options.quick else min(most, max(least, fitting)))
    times = in_turn(steps, rounds)
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    parts = {
        name: worker.ask("parts") for name, worker in workers.items() if name.startswith("castalia")
    }
    stop(workers)
    facts = {
        "shape": one.shape,
        "family": options.family,
        "rows": one.rows,
        "seq": one.seq,
        "dtype": one.dtype,
        "instructions": "cuda" if options.gpu else instructions(this_machine()),
        "products": products_of(one, device, options.products),
        "rounds": rounds,
        "flops_per_token": flops_per_token(config, one.seq),
    }
    return facts | compare(config, one, times, memory, parts)


def values_of(one: Case, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the engines of a case are told."""
    config = config_of(one.shape, options.family)
    return {
        "model": config.model_dump(),
        "vocab_size": TOKENIZER_IDS,
        "padded_vocab_size": config.padded_vocab_size,
        "rows": one.rows,
        "seq": one.seq,
        "dtype": one.dtype,
        "device": device,
        "products": products_of(one, device, options.products),
        # Compiles. The round that tells how many fit is not counted either.
        "warmup": 1,
    }


def products_of(one: Case, device: str, wanted: str) -> str:
    """The library of Castalia's products; see train.products."""
    if one.dtype != "fp32" or device != "cpu":
        return "torch"
    return faster_library(one.rows * one.seq) if wanted == "auto" else wanted


def stop(workers: dict[str, Worker]) -> None:
    """End the case in the engines, which wait for the next one."""
    for worker in workers.values():
        worker.ask("stop")


def start(names: tuple[str, ...], values: dict[str, Any]) -> dict[str, Worker]:
    """The engines, ready, by name."""
    for name in names:
        if name not in WORKERS:
            library, compiled, keeps = ENGINES[name]
            kind = {"engine": library, "compiled": compiled, "keeps_memory": keeps}
            WORKERS[name] = Worker("training_engines.py", kind)
    # Two at once: compiling has a thread or two, and warm-up steps are not timed.
    for first in range(0, len(names), 2):
        pair = names[first : first + 2]
        for name in pair:
            WORKERS[name].tell(json.dumps(values))
        for name in pair:
            WORKERS[name].answer()
    return {name: WORKERS[name] for name in names}


def compare(
    config: TransformerConfig,
    one: Case,
    times: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
    parts: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Tokens/s of all engines, ratios to each peer, and Castalia's time by part."""
    tokens = one.rows * one.seq
    engines = {
        name: {
            "tokens_per_second": summary(tokens / t for t in seconds),
            "seconds": summary(seconds),
            "peak_gb": memory[name]["peak"] / 1e9,
            "above_imports_gb": (memory[name]["peak"] - memory[name]["imported"]) / 1e9,
        }
        for name, seconds in times.items()
    }
    own = [name for name in times if name.startswith("castalia")]
    if not own:
        return {"engines": engines, "ours": None, "ratios": {}, "memory_ratios": {}, "parts": {}}
    ours = min(own, key=lambda name: engines[name]["seconds"]["median"])
    others = [name for name in times if name not in own]
    total = sum(parts[ours].values())
    return {
        "engines": engines,
        "ours": ours,
        "ratios": {name: ratio(times[name], times[ours]) for name in others},
        "memory_ratios": {
            name: engines[ours]["peak_gb"] / engines[name]["peak_gb"] for name in others
        },
        "parts": {
            name: {
                "seconds": s,
                "share": s / total,
                "flops": part_flops(config, name, tokens, one.seq),
            }
            for name, s in parts[ours].items()
        },
        "parts_step_seconds": total,
    }


def part_flops(config: TransformerConfig, part: str, tokens: int, seq: int) -> int:
    """FLOPs of a part of a step: its share of 6 N, or attention's causal products over T."""
    if part == "head":
        return 6 * config.padded_vocab_size * config.hidden_size * tokens
    if part == "attention":
        width = config.num_attention_heads * config.head_dim
        return 6 * config.num_layers * width * seq * tokens
    if part == "rest of the blocks":
        linears = family_of(config).parts(config).linears
        weights = sum(linear.outputs * linear.inputs for linear in linears)
        return 6 * config.num_layers * weights * tokens
    return 0


def print_case(case: dict[str, Any], rate: float, peak: float | None) -> None:
    """The table of one case."""
    name = "Pythia" if case["family"] == "neox" else "LLaMA of Pythia"
    print(f"\n{name}-{case['shape']}, {case['rows']} x {case['seq']} tokens, {case['dtype']}")
    print(f"instructions: {case['instructions']}; {rate / 1e9:.0f} GFLOP/s")
    print(
        f"{'engine':<40}{'tokens/s':>10}{'spread':>18}{'of matrix rate':>16}{'peak GB':>9}"
        f"{'- imports':>11}{'ours is':>9}"
    )
    for name, engine in case["engines"].items():
        speed = engine["tokens_per_second"]
        share = speed["median"] * case["flops_per_token"] / rate
        times = ""
        if name in case["ratios"]:
            times = f"{case['ratios'][name]['median']:>8.2f}x"
        print(
            f"{name:<40}{speed['median']:>10,.0f}{speed['low']:>9,.0f}..{speed['high']:<7,.0f}"
            f"{share:>15.0%}{engine['peak_gb']:>10.2f}{engine['above_imports_gb']:>11.2f}{times}"
        )
        if peak:
            print(f"{'':<40}MFU {speed['median'] * case['flops_per_token'] / peak:.1%}")
    for name, part in case["parts"].items():
        share = ""
        if part["flops"]:
            share = f"{part['flops'] / part['seconds'] / rate:>10.0%} of the matrix rate"
        print(f"  {name:<20}{part['seconds'] * 1e3:>8.0f} ms {part['share']:>5.0%}{share}")


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case with its goal: the ratio to the best of transformers, and to every peer."""
    speeds = {
        (case["shape"], case["seq"], case["dtype"]): case["engines"][case["ours"]][
            "tokens_per_second"
        ]["median"]
        for case in results
        if case["ours"]
    }
    judged = []
    for case in results:
        peers = {name: r for name, r in case["ratios"].items() if "our allocator" not in name}
        if not peers:
            continue
        own = speeds[case["shape"], case["seq"], case["dtype"]]
        rivals = [speed for key, speed in speeds.items() if key[:2] == (case["shape"], case["seq"])]
        faster = own >= max(rivals)
        theirs = [r["median"] for name, r in peers.items() if name.startswith("transformers")]
        goal = GOAL if faster else GOAL_ELSEWHERE
        judged.append(
            {
                "shape": case["shape"],
                "seq": case["seq"],
                "dtype": case["dtype"],
                "faster_dtype": faster,
                "tokens_per_second": own,
                "over_transformers": min(theirs, default=None),
                "over_best_peer": min(r["median"] for r in peers.values()),
                "goal": goal,
                "reached": min(theirs, default=goal) >= goal
                and all(r["median"] > 1.0 for r in peers.values()),
                "instructions": case["instructions"],
            }
        )
    return judged


def print_judgement(judged: list[dict[str, Any]]) -> None:
    """The goals, one line a case."""
    print(f"\n{'case':<22}{'tokens/s':>10}{'/ transformers':>16}{'/ best peer':>13}{'goal':>6}")
    for row in judged:
        case = f"{row['shape']}, T {row['seq']}, {row['dtype']}"
        over = row["over_transformers"]
        shown = "" if over is None else f"{over:.2f}"
        word = "reached" if row["reached"] else "missed"
        print(
            f"{case:<22}{row['tokens_per_second']:>10,.0f}{shown:>16}{row['over_best_peer']:>13.2f}"
            f"{row['goal']:>6.1f} {word}; {row['instructions']}"
        )


if __name__ == "__main__":
    main()
