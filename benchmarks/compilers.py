"""Decoding with the compiled step as several compilers, levels of instructions or versions make it.

    python benchmarks/compilers.py g++ zig               # compilers, each with an empty cache
    python benchmarks/compilers.py g++ dist/castalia-0.1.0-py3-none-linux_x86_64.whl
    python benchmarks/compilers.py bf16 x86-64-v3 x86-64-v2          # levels, as CASTALIA_ISA
    python benchmarks/compilers.py g++ ../other/src                  # another version of the code
    python benchmarks/compilers.py --quick g++ clang++

A wheel runs without any compiler. Pythia's shape of 70M with random weights, greedy, after prompts
of 32 tokens; all sides take turns, each in a process of its own. Ratios are of tokens a second to
the first side's, round by round.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, in_turn, ratio, seconds, summary
from worker import Worker

from inference import RESULTS, write_models

SOURCE = Path(__file__).resolve().parents[1] / "src"
NUMBERS = ("int8", "fp32")


class Side(Worker):
    """The engine as one compiler or level makes it."""

    def __init__(self, name: str, models: dict[str, Path], folder: Path, threads: int) -> None:
        cache = folder / f"cache-{Path(name).name}"
        script = Path(__file__).resolve().parent
        changed = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(SOURCE)}
        if name.endswith(".whl"):
            place = folder / Path(name).stem
            with zipfile.ZipFile(name) as wheel:
                wheel.extractall(place)
            changed |= {"PYTHONPATH": str(place), "CASTALIA_CXX": "none"}
        elif Path(name).is_dir():
            changed["PYTHONPATH"] = str(Path(name).resolve())
            # The words of that version for decoding.
            script = Path(name).resolve().parent / "benchmarks"
        elif shutil.which(name) or name == "zig":
            changed["CASTALIA_CXX"] = name
        else:
            changed["CASTALIA_ISA"] = name
        before = dict(os.environ)
        os.environ.update(changed)
        try:
            places = {numbers: str(path) for numbers, path in models.items()}
            case = {"models": places, "threads": threads, "benchmarks": str(script)}
            super().__init__("compilers.py", case)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.hello = self.answer()

    def decode(self, numbers: str, batch: int, new: int) -> float:
        """Seconds for `new` tokens of each of `batch` texts."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([numbers, batch, new]) + "\n")
        self.process.stdin.flush()
        return float(self.answer())


def serve(case: dict[str, Any]) -> None:
    """Answer requests on stdin: numbers, batch and new tokens, in seconds."""
    torch.set_num_threads(case["threads"])
    sys.path.insert(0, case["benchmarks"])
    start = time.perf_counter()
    from castalia.native import compiled

    assert compiled.library() is not None, "no compiled step"
    # An older version of the code does not tell.
    level = getattr(compiled, "level", lambda: None)()
    built = time.perf_counter() - start
    from inference_engines import Ours

    engines = {numbers: Ours(folder, numbers) for numbers, folder in case["models"].items()}
    print(json.dumps({"level": level, "load_seconds": round(built, 2)}), flush=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 50000, (64, 32), generator=generator).tolist()
    for line in sys.stdin:
        numbers, batch, new = json.loads(line)
        engine = engines[numbers]
        print(seconds(lambda e=engine, b=batch, n=new: e.decode(prompts[:b], n)), flush=True)


def main() -> None:
    """Measure the sides in turn and print ratios, spreads and levels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sides", nargs="+", help="compilers, levels, wheels, or folders of source")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=64, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--size", default="70m", choices=("70m", "160m", "tiny"))
    parser.add_argument("--numbers", default=",".join(NUMBERS))
    parser.add_argument("--models", type=Path, help="where exports and libraries are kept")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds")
    parser.add_argument("--save", action="store_true", help="to results/compilers.json")
    options = parser.parse_args()
    if options.quick:
        options.size = "tiny"
        options.rounds = 2
    with tempfile.TemporaryDirectory(prefix="castalia-compilers-") as temporary:
        print_ratios(options, Path(temporary))


def print_ratios(options: argparse.Namespace, folder: Path) -> None:
    """All rows."""
    engines = [f"native {numbers}" for numbers in options.numbers.split(",")]
    place = options.models or folder
    models = {e.split()[1]: place / options.size / e.replace(" ", "-") for e in engines}
    if not all(path.exists() for path in models.values()):
        write_models("neox", options.size, place, engines)
    sides = {name: Side(name, models, place, options.threads) for name in options.sides}
    facts = describe() | {"threads": options.threads}
    print(json.dumps(facts))
    for name, side in sides.items():
        print(f"{name}: level {side.hello['level']}, library in {side.hello['load_seconds']} s")
    rows = []
    first = options.sides[0]
    for numbers in models:
        for batch in map(int, options.batches.split(",")):
            for side in sides.values():
                side.decode(numbers, batch, 8)
            works = {
                name: (lambda s=side, n=numbers, b=batch: s.decode(n, b, options.new))
                for name, side in sides.items()
            }
            times = in_turn(works, options.rounds)
            for name, measured in times.items():
                rate = batch * options.new / summary(measured)["median"]
                to = ratio(times[first], measured)
                row = {"numbers": numbers, "batch": batch, "side": name, "tokens_per_s": rate}
                rows.append(row | {"ratio": to})
                print(
                    f"{numbers} batch {batch}: {name} {rate:.0f} tokens/s,"
                    f" {to['median']:.3f} ({to['low']:.3f}–{to['high']:.3f}) of {first}",
                    flush=True,
                )
    if options.save:
        levels = {name: side.hello for name, side in sides.items()}
        result = {"machine": facts, "sides": levels, "rows": rows}
        (RESULTS / "compilers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve(json.loads(sys.argv[1]))
    else:
        main()
