"""Speed and memory of a training step against transformers' model of the same family.

    python benchmarks/training.py [--quick] [--family neox|llama] [--shapes 14m,70m]
                                  [--seq 512,2048] [--gpu] [--json FILE]

Pythia's shapes under bf16 autocast; as LLaMA they have RMSNorm, SwiGLU of 8/3 the width, serial
blocks, and half as many heads of keys as of queries. Every engine runs in a process of its own and
all step in turn, so that disturbances of the machine affect all alike. Both sides have fp32
weights, fused AdamW, the same batch and no clipping; each counts with the better of eager and
compiled. Ratios are taken round by round; `low` and `high` are quartiles. Memory is the peak
resident size of the faster engine's process, libraries included. A last engine is transformers
compiled under Castalia's allocator settings, which shows how much of the ratio the settings alone
give.

FLOPs of a token are 6 N + 12 L d T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): N weights
in matrix products (head included, embedding not), L layers of width d, rows of T tokens. Shares
refer to the rate of one square bf16 product on the same machine in the same run.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_turn, matrix_rate, ratio, summary
from worker import Worker

from castalia.models import TransformerConfig, build_model_config
from castalia.models.families import family_of
from castalia.models.flops import flops_per_token
from castalia.monitor import peak_flops
from castalia.recipes.pythia import SIZES, TOKENIZER_IDS, model

HERE = Path(__file__).resolve().parent
ROWS = {("14m", 512): 8, ("70m", 512): 4, ("14m", 2048): 2, ("70m", 2048): 1}
"""Rows of T tokens in a step on a CPU; 1 for other cases."""
GPU_ROWS = {"160m": 16, "410m": 16, "1.4b": 8}
ENGINES = {
    "castalia eager": ("castalia", False, True),
    "castalia compiled": ("castalia", True, True),
    "transformers eager": ("transformers", False, False),
    "transformers compiled": ("transformers", True, False),
    "transformers compiled, our allocator": ("transformers", True, True),
}
"""Name -> library, whether compiled, whether freed memory stays with the process."""


def main() -> None:
    """Run every case, print a table after each, write JSON at the end."""
    options = read_options()
    device = "cuda" if options.gpu else "cpu"
    machine = describe(device)
    rates = {
        str(dtype).removeprefix("torch."): matrix_rate(dtype, device)
        for dtype in (torch.bfloat16, torch.float32)
    }
    machine["matrix_gflops"] = {name: round(rate / 1e9) for name, rate in rates.items()}
    print(json.dumps(machine))
    if options.gpu:
        cases = [(shape, 2048, GPU_ROWS.get(shape, 8)) for shape in options.shapes]
    else:
        cases = [
            (shape, seq, ROWS.get((shape, seq), 1))
            for seq in options.seq
            for shape in options.shapes
        ]
    results = []
    for shape, seq, rows in cases:
        results.append(run_case(shape, seq, rows, device, options))
        print_case(results[-1], rates["bfloat16"], peak_flops(torch.device(device)))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="three rounds, T = 512 only, no fifth engine"
    )
    parser.add_argument("--gpu", action="store_true", help="on CUDA: 160m, 410m, 1.4b at T = 2048")
    parser.add_argument("--family", choices=("neox", "llama"), default="neox")
    parser.add_argument(
        "--shapes", type=lambda text: text.split(","), help="Pythia sizes, for instance 14m,70m"
    )
    parser.add_argument(
        "--seq", type=lambda text: [int(t) for t in text.split(",")], help="row lengths T"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each engine")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    options.shapes = options.shapes or (["160m", "410m", "1.4b"] if options.gpu else ["14m", "70m"])
    options.seq = options.seq or ([512] if options.quick else [512, 2048])
    options.rounds = options.rounds or (3 if options.quick else 11)
    name = "training" if options.family == "neox" else f"training-{options.family}"
    options.json = options.json or HERE / "results" / (
        f"{name}-gpu.json" if options.gpu else f"{name}.json"
    )
    if unknown := set(options.shapes) - set(SIZES):
        parser.error(
            f"unknown Pythia size {', '.join(sorted(unknown))}; choose one of {', '.join(SIZES)}"
        )
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch sees none")
    return options


def config_of(shape: str, family: str) -> TransformerConfig:
    """A Pythia size, or a LLaMA of its layers, width and heads."""
    values = model(SIZES[shape])
    if family == "llama":
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        heads = values["num_attention_heads"]
        values = {name: values[name] for name in sizes}
        values |= {"family": "llama", "num_kv_heads": heads // 2}
    config = build_model_config(values, "a benchmark")
    assert isinstance(config, TransformerConfig)
    return config


def run_case(
    shape: str, seq: int, rows: int, device: str, options: argparse.Namespace
) -> dict[str, Any]:
    """All engines at one shape, in turn."""
    config = config_of(shape, options.family)
    case = {
        "model": config.model_dump(),
        "vocab_size": TOKENIZER_IDS,
        "padded_vocab_size": config.padded_vocab_size,
        "rows": rows,
        "seq": seq,
        "device": device,
        "warmup": 2 if options.quick else 3,
    }
    names = list(ENGINES)[: 4 if options.quick or device == "cuda" else 5]
    workers: dict[str, Worker] = {}
    # One after the other, so that compiling does not disturb another's warm-up.
    for name in names:
        library, compiled, keeps = ENGINES[name]
        workers[name] = Worker(
            "training_engines.py",
            case | {"engine": library, "compiled": compiled, "keeps_memory": keeps},
        )
        workers[name].answer()
    times = in_turn(
        {name: partial(worker.ask, "step") for name, worker in workers.items()}, options.rounds
    )
    memory = {name: worker.ask("memory") for name, worker in workers.items()}
    parts = {
        name: worker.ask("parts") for name, worker in workers.items() if name.startswith("castalia")
    }
    for worker in workers.values():
        worker.tell("stop")
        worker.process.wait()
    facts = {
        "shape": shape,
        "family": options.family,
        "rows": rows,
        "seq": seq,
        "flops_per_token": flops_per_token(config, seq),
    }
    return facts | compare(config, rows * seq, times, memory, parts)


def compare(
    config: TransformerConfig,
    tokens: int,
    times: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
    parts: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Tokens/s of all engines, the better of each side, ratios, and Castalia's time by part."""
    engines = {
        name: {
            "tokens_per_second": summary(tokens / t for t in seconds),
            "seconds": summary(seconds),
            "peak_gb": memory[name]["peak"] / 1e9,
            "above_imports_gb": (memory[name]["peak"] - memory[name]["imported"]) / 1e9,
        }
        for name, seconds in times.items()
    }
    # Without the engine under Castalia's allocator, which is not what users of transformers run.
    plain = [name for name in times if "our allocator" not in name]
    ours, theirs = (
        min((n for n in plain if n.startswith(side)), key=lambda n: engines[n]["seconds"]["median"])
        for side in ("castalia", "transformers")
    )
    total = engines[ours]["seconds"]["median"]
    spent = parts[ours] | {"other": total - sum(parts[ours].values())}
    return {
        "engines": engines,
        "ours": ours,
        "theirs": theirs,
        "speed_ratio": ratio(times[theirs], times[ours]),
        "speed_ratio_with_our_allocator": {
            name: ratio(seconds, times[ours])
            for name, seconds in times.items()
            if "our allocator" in name
        },
        "memory_ratio": engines[ours]["peak_gb"] / engines[theirs]["peak_gb"],
        "memory_ratio_above_imports": engines[ours]["above_imports_gb"]
        / engines[theirs]["above_imports_gb"],
        "parts": {
            name: {"seconds": s, "share": s / total, "flops": part_flops(config, name, tokens)}
            for name, s in spent.items()
        },
    }


def part_flops(config: TransformerConfig, part: str, tokens: int) -> int:
    """FLOPs of a part of a step: its share of 6 N, without attention's products over T."""
    weights = {"head": config.padded_vocab_size * config.hidden_size, "attention": 0, "mlp": 0}
    for linear in family_of(config).parts(config).linears:
        place = "mlp" if linear.role.startswith("mlp") else "attention"
        weights[place] += config.num_layers * linear.outputs * linear.inputs
    return 6 * weights.get(part, 0) * tokens


def print_case(case: dict[str, Any], rate: float, peak: float | None) -> None:
    """The table of one case."""
    name = "Pythia" if case["family"] == "neox" else "LLaMA of Pythia"
    print(f"\n{name}-{case['shape']}, {case['rows']} x {case['seq']} tokens")
    print(
        f"{'engine':<40}{'tokens/s':>10}{'spread':>18}{'of matrix rate':>16}{'peak GB':>9}"
        f"{'- imports':>11}"
    )
    for name, engine in case["engines"].items():
        speed = engine["tokens_per_second"]
        share = speed["median"] * case["flops_per_token"] / rate
        print(
            f"{name:<40}{speed['median']:>10,.0f}{speed['low']:>9,.0f}..{speed['high']:<7,.0f}"
            f"{share:>15.0%}{engine['peak_gb']:>10.2f}{engine['above_imports_gb']:>11.2f}"
        )
        if peak:
            print(f"{'':<40}MFU {speed['median'] * case['flops_per_token'] / peak:.1%}")
    r = case["speed_ratio"]
    print(
        f"{case['ours']} is {r['median']:.2f} ({r['low']:.2f}..{r['high']:.2f}) times as fast as"
        f" {case['theirs']}, with {case['memory_ratio']:.2f} of its memory,"
        f" {case['memory_ratio_above_imports']:.2f} above the imports"
    )
    for name, other in case["speed_ratio_with_our_allocator"].items():
        print(
            f"  and {other['median']:.2f} ({other['low']:.2f}..{other['high']:.2f}) times as fast"
            f" as {name}"
        )
    for name, part in case["parts"].items():
        share = ""
        if part["flops"]:
            share = f"{part['flops'] / part['seconds'] / rate:>10.0%} of the matrix rate"
        print(f"  {name:<10}{part['seconds'] * 1e3:>8.0f} ms {part['share']:>5.0%}{share}")


if __name__ == "__main__":
    main()
