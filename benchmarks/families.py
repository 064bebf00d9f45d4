"""Speed and memory of each model family beside transformers' implementation, on a CPU.

    python benchmarks/families.py [--quick] [--families neox,mamba] [--parts training,decoding]
                                  [--rows 4] [--seq 512] [--contexts 128,512,2048,8192]
                                  [--rounds 5] [--seconds 8] [--same-allocator] [--json FILE]

One model of each family with about as many weights in use (families_shapes.py). Every side runs in
a process of its own, reads the same weights and the same batch, and all take turns. First loss and
norm of the gradients are compared.
Training is one forward and backward pass in fp32, and under bf16 autocast where the processor has
instructions for it; weights are fp32, nothing is compiled. A slow side gets fewer rounds, three at
least, so that a measurement takes about `--seconds`. Memory is the peak resident size of a side
after the fp32 passes, above that after its imports. Castalia keeps freed memory, as `castalia
train` does; `--same-allocator` gives the others the same settings.
Decoding is greedy, one text, with Castalia's engine `torch` and with transformers' `generate` and
its cache: the median time from a token to the next, after prompts of several lengths.
RWKV 6 and 7, which transformers does not have, stand beside the literal recurrence, one token after
another in PyTorch with everything else in products over whole rows, and beside transformers' RWKV 4
of the same width and depth, which is another model. `low` and `high` are quartiles.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families_engines import WEIGHTS
from families_shapes import (
    LONGEST_CONTEXT,
    PEERS,
    SHAPES,
    SMALL_BATCHES,
    VOCABULARY,
    model_values,
)
from machine import describe, in_turn, matrix_rate, ratio, summary
from safetensors.torch import save_file
from worker import Worker

from castalia.checkpoint.hf import write_hf
from castalia.distributed import initialize
from castalia.models import Decoder, ModelConfig, build_model_config, parameter_counts
from castalia.models.flops import active_parameters
from castalia.models.init import start_weights

HERE = Path(__file__).resolve().parent
LEAST_ROUNDS = 2
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def main() -> None:
    """Run every family, print a table after each, write JSON at the end."""
    options = read_options()
    machine = describe()
    machine["matrix_gflops"] = {
        str(dtype).removeprefix("torch."): round(matrix_rate(dtype) / 1e9)
        for dtype in (torch.bfloat16, torch.float32)
    }
    print(json.dumps(machine), flush=True)
    precisions = ["fp32"]
    if BF16_INSTRUCTIONS & set(machine["features"]):
        precisions.append("bf16")
    cases = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(run_case(family, Path(folder), precisions, options))
        print_case(cases[-1])
    sizes = {"rows": options.rows, "seq": options.seq, "same_allocator": options.same_allocator}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, **sizes, "cases": cases}, indent=1)
    options.json.write_text(text + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="2 rows of 256, two rounds, contexts of 128 and 1024"
    )
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=["training", "decoding"]
    )
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--seq", type=int, help="tokens of a row")
    parser.add_argument(
        "--contexts", type=lambda text: [int(t) for t in text.split(",")], help="tokens of prompts"
    )
    parser.add_argument("--new", type=int, default=32, help="tokens generated after each prompt")
    parser.add_argument("--rounds", type=int, help="most timed passes of each side")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one measurement, about")
    parser.add_argument("--same-allocator", action="store_true")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "families.json")
    options = parser.parse_args()
    options.rows = options.rows or (2 if options.quick else 4)
    options.seq = options.seq or (256 if options.quick else 512)
    options.rounds = options.rounds or (LEAST_ROUNDS if options.quick else 5)
    short = [128, 1024]
    options.contexts = options.contexts or (short if options.quick else [128, 512, 2048, 8192])
    if "decoding" not in options.parts:
        options.contexts = []
    if unknown := set(options.families) - set(SHAPES):
        parser.error(f"unknown family {', '.join(sorted(unknown))}; choose of {', '.join(SHAPES)}")
    if unknown := set(options.parts) - {"training", "decoding"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose of training, decoding")
    return options


def run_case(
    family: str, folder: Path, precisions: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """All sides of one family, in turn."""
    most = LONGEST_CONTEXT.get(family, max(options.contexts, default=0))
    contexts = [length for length in options.contexts if length <= most]
    longest = max([options.seq, *(length + options.new + 1 for length in contexts)])
    config = build_model_config(model_values(family, longest), "a benchmark")
    names = ("castalia", *PEERS.get(family, ("transformers",)))
    write_weights(folder, config, "transformers" in names)
    rows, seq = SMALL_BATCHES.get(family, (options.rows, options.seq))
    case = {
        "model": config.model_dump(),
        "folder": str(folder),
        "vocab_size": VOCABULARY,
        "rows": rows,
        "seq": seq,
        "whole": [options.rows, options.seq],
        "contexts": contexts,
        "new": options.new,
        "same_allocator": options.same_allocator,
    }
    workers = {name: Worker("families_engines.py", case | {"side": name}) for name in names}
    facts = {name: worker.answer() for name, worker in workers.items()}
    counts = parameter_counts(config)
    result: dict[str, Any] = {
        "family": family,
        "parameters": counts.total,
        "active": active_parameters(config),
        "rows": rows,
        "seq": seq,
        "facts": facts,
    }
    if "training" in options.parts:
        result |= training(workers, precisions, rows * seq, options)
        result["whole_batch"] = whole_batch(workers["castalia"], precisions, options)
    result["decoding"] = {length: decoding(workers, length) for length in contexts}
    for worker in workers.values():
        worker.tell("stop")
        worker.process.wait()
    return result


def write_weights(folder: Path, config: ModelConfig, for_transformers: bool) -> None:
    """One draw of weights, as each side reads it."""
    model = Decoder(config)
    initialize(model, start_weights(config, 0))
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    if for_transformers:
        write_hf(folder, tensors, config, end_ids=(0,))


def training(
    workers: dict[str, Worker], precisions: list[str], tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens/s at each precision for a batch of so many `tokens`, and the peak memory of the first,
    fp32."""
    speeds = {}
    for precision in precisions:
        # The first pass in a precision is warm-up, and says how many rounds are affordable.
        first = sum(worker.ask(precision) for worker in workers.values())
        rounds = max(LEAST_ROUNDS, min(options.rounds, int(options.seconds / first)))
        works = {name: partial(worker.ask, precision) for name, worker in workers.items()}
        times = in_turn(works, rounds)
        if precision == "fp32":
            memory = {name: worker.ask("memory") for name, worker in workers.items()}
        speeds[precision] = {
            name: {"tokens_per_second": summary(tokens / t for t in seconds), "rounds": rounds}
            for name, seconds in times.items()
        }
        for name, seconds in times.items():
            speeds[precision][name]["ratio"] = ratio(seconds, times["castalia"])
    above = {name: (m["peak"] - m["imported"]) / 1e9 for name, m in memory.items()}
    return {"training": speeds, "memory": memory, "above_imports_gb": above}


def whole_batch(
    castalia: Worker, precisions: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Castalia's tokens/s with the batch of all families, where the others read a small one."""
    speeds = {}
    for precision in precisions:
        # One pass to warm up.
        times = [castalia.ask(f"whole {precision}") for _ in range(LEAST_ROUNDS + 1)][1:]
        speeds[precision] = summary(options.rows * options.seq / t for t in times)
    return speeds


def decoding(workers: dict[str, Worker], length: int) -> dict[str, Any]:
    """Tokens/s of each side after a prompt of `length` tokens."""
    return {
        name: summary(1 / seconds for seconds in worker.ask(f"decode {length}"))
        for name, worker in workers.items()
    }


def print_case(case: dict[str, Any]) -> None:
    """The table of one family."""
    size = f"{case['parameters'] / 1e6:.1f} M parameters, {case['active'] / 1e6:.1f} M in use"
    print(f"\n{case['family']}, {size}; {case['rows']} x {case['seq']} tokens", flush=True)
    own = case["facts"]["castalia"]
    for name, facts in case["facts"].items():
        line = f"  {name:<20}loss {facts['loss']:.6f}"
        line += f"  gradient norm {facts['gradient_norm']:.6f}"
        if name != "castalia":
            line += f"  differences {abs(facts['loss'] - own['loss']):.1e}"
            line += f" {abs(facts['gradient_norm'] - own['gradient_norm']):.1e}"
        print(line)
    for precision, sides in case.get("training", {}).items():
        for name, side in sides.items():
            speed = side["tokens_per_second"]
            line = f"  {precision} {name:<20}{speed['median']:>9,.0f} tokens/s"
            line += f" ({speed['low']:,.0f}-{speed['high']:,.0f})"
            if name != "castalia":
                r = side["ratio"]
                line += f"  castalia {r['median']:.2f}x ({r['low']:.2f}-{r['high']:.2f})"
            if precision == "fp32":
                line += f"  {case['above_imports_gb'][name]:.2f} GB above imports"
            print(line)
    for precision, speed in case.get("whole_batch", {}).items():
        line = f"  {precision} castalia, whole batch {speed['median']:>7,.0f} tokens/s"
        print(line + f" ({speed['low']:,.0f}-{speed['high']:,.0f})")
    for length, sides in case["decoding"].items():
        line = f"  after {length:>5} tokens:"
        for name, speed in sides.items():
            line += f"  {name} {speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})"
        print(line + " tokens/s")


if __name__ == "__main__":
    main()
