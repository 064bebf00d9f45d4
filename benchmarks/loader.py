"""The loader alone: rows and bytes a second out of a large token file in random order, against what a model eats.

    python benchmarks/loader.py [--gigabytes N] [--memory-gigabytes 0] [--steps 200] [--file PREFIX] [--json FILE]

The file is written, not a hole in the disk, and is larger than the memory unless --gigabytes says else, so that the
page cache cannot hold it; it is removed at the end unless --file says where it is to stay. Its rows are read in
GPT-NeoX's shuffled order, so each is a random access. `cold` asks the kernel to forget the file before each round: all
rows come from the disk. `warm` reads the same rows again. `--memory-gigabytes` is for a container that has less memory
than the machine. The model is a Pythia on this machine's processor, forward and backward, and the slowest case must be
50 times as fast. For a node of 8 H200 the tokens a second are an estimate: 989 TFLOP/s each in bf16, half of it used; a
loader for each GPU runs there, the rate here is that of one.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
SEQ_LENGTH, BATCH = 2048, 64
DOCUMENT = 1400
"""Tokens of a document, about the Pile's mean."""
PIECE = 12_000
"""Documents that are written at a time, 34 MB."""
H200_FLOPS, USED, GPUS = 989e12, 0.5, 8
"""Dense bf16 of NVIDIA's data sheet; the share that training reaches is assumed."""
LEAST = 50
"""Times the model's rate."""
OVER, SPARE = 1.1, 8e9
"""The file's size over the memory's; bytes of the disk that stay free."""
SUITE = {"pythia-70m": 70e6, "pythia-1b": 1.01e9, "pythia-12b": 11.8e9}


def main() -> None:
    """Make the file, read it, remove it; run the model; print a table, write JSON."""
    options = read_options()
    folder = (
        options.file.parent if options.file else Path(tempfile.mkdtemp(prefix="castalia-loader-"))
    )
    prefix = options.file or folder / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    memory = options.memory_gigabytes * 1e9 or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    )
    wanted = options.gigabytes * 1e9 or min(OVER * memory, shutil.disk_usage(folder).free - SPARE)
    try:
        size = make_file(prefix, int(wanted))
        works = {
            f"{name}, {workers} workers": functools.partial(
                read_rows, prefix, options.steps, workers, name == "cold"
            )
            for workers in options.workers
            for name in ("cold", "warm")
        }
        found = machine.in_turn(works, options.rounds)
    finally:
        if options.file is None:
            shutil.rmtree(folder)
    eaten = model_rate(options.model, options.model_rows)
    cases = {name: case(rates, eaten) for name, rates in found.items()}
    best = [(name, line["rows_per_s"] * SEQ_LENGTH) for name, line in cases.items()]
    node = {
        f"{model}, {name}": estimate(
            max(rate for read, rate in best if read.startswith(name)), weights
        )
        for model, weights in SUITE.items()
        for name in ("cold", "warm")
    }
    record = {
        "machine": machine.describe(),
        "bytes": size,
        "larger_than_memory": size > memory,
        "cases": cases,
    }
    record |= {
        "model": options.model,
        "model_rows_per_s": eaten,
        "h200_node": node,
        "seq_length": SEQ_LENGTH,
    }
    show(record, memory)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    if (slowest := min(line["times_the_model"] for line in cases.values())) < LEAST:
        raise SystemExit(f"the slowest case is {slowest:.1f} times the model, less than {LEAST}")


def show(record: dict[str, Any], memory: float) -> None:
    """The table."""
    print(f"{record['model']} eats {record['model_rows_per_s']:,.1f} rows/s here; ", end="")
    print(f"the file has {record['bytes'] / 1e9:.2f} GB, the memory {memory / 1e9:.1f} GB", end="")
    print("" if record["larger_than_memory"] else ": the page cache may hold it")
    print(f"{'case':<20}{'rows/s':>12}{'MB/s':>10}{'spread':>8}{'x model':>10}")
    for name, line in record["cases"].items():
        print(
            f"{name:<20}{line['rows_per_s']:>12,.0f}{line['mb_per_s']:>10,.1f}{line['spread']:>8.2f}",
            end="",
        )
        print(f"{line['times_the_model']:>10,.0f}")
    for name, line in record["h200_node"].items():
        print(f"{name} on {GPUS} H200, estimated: {line['tokens_per_s']:,.0f} tokens/s,", end="")
        print(f" one loader gives {line['times']:.1f} times that")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rows and bytes a second of the loader.")
    parser.add_argument(
        "--gigabytes", type=float, default=0.0, help="size of the file, default 1.1 times memory"
    )
    parser.add_argument(
        "--memory-gigabytes", type=float, default=0.0, help="memory that the page cache may use"
    )
    parser.add_argument("--steps", type=int, default=200, help=f"steps of {BATCH} rows in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--model", default="pythia-14m")
    parser.add_argument("--model-rows", type=int, default=4)
    parser.add_argument(
        "--file", type=Path, help="prefix of a file that stays, and is taken if it is large enough"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loader.json")
    return parser.parse_args()


def make_file(prefix: Path, size: int) -> int:
    """A token file of at least `size` bytes, the same random u16 ids again and again; one that is there is kept. Its
    bytes."""
    from castalia.data import IndexedDatasetWriter

    path = prefix.with_name(prefix.name + ".bin")
    if path.exists() and path.stat().st_size >= size:
        return path.stat().st_size
    tokens, written = np.random.default_rng(0).integers(0, 50000, PIECE * DOCUMENT, np.uint16), 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while written < size:
            writer.add_many(tokens, np.full(PIECE, DOCUMENT))
            written += tokens.nbytes
    return path.stat().st_size


def read_rows(prefix: Path, steps: int, workers: int, cold: bool) -> float:
    """Rows a second of the loader over `steps` steps; the first batch and the start of workers do not count."""
    from castalia.data import DataConfig, StepLoader, build_rows

    if cold:
        forget(prefix.with_name(prefix.name + ".bin"))
    config = DataConfig(seq_length=SEQ_LENGTH, train=[str(prefix)])
    sizes: dict[str, Any] = {"seed": 1234, "batch_size": BATCH, "steps": steps + 1}
    rows = build_rows(config, **sizes, eval_every=None, eval_batches=1).train
    batches = iter(StepLoader(rows, batch_size=BATCH, workers=workers, vocab_size=50304))
    next(batches)
    start = time.perf_counter()
    taken = sum(len(batch.tokens) for step in itertools.islice(batches, steps) for batch in step)
    spent = time.perf_counter() - start
    batches.close()
    return taken / spent


def forget(path: Path) -> None:
    """Ask the kernel to drop the file's pages."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_rate(preset: str, rows: int) -> float:
    """Rows a second of a forward and backward pass here, the median of three."""
    import torch

    from castalia.data import Batch
    from castalia.distributed import initialize
    from castalia.models import Decoder
    from castalia.models.init import start_weights
    from castalia.recipes import load_config
    from castalia.train.losses import NextToken, Scored

    config = load_config([preset])
    model = Decoder(config.model)
    initialize(model, start_weights(model.config, 0))
    ids = torch.randint(0, config.model.vocab_size, (rows, SEQ_LENGTH + 1))
    batch = Batch(
        ids[:, :-1],
        ids[:, 1:].contiguous(),
        torch.zeros(rows, dtype=torch.int32),
        torch.arange(rows),
    )
    loss = NextToken()
    spent = [
        machine.seconds(lambda: loss(Scored.by(model, batch), batch).total.backward())
        for _ in range(4)
    ][1:]
    return rows / statistics.median(spent)


def case(rates: list[float], eaten: float) -> dict[str, float]:
    """Median rate of a case, its spread (highest less lowest over the median), and how many models it feeds."""
    middle = statistics.median(rates)
    return {
        "rows_per_s": middle,
        "mb_per_s": middle * (SEQ_LENGTH + 1) * 2 / 1e6,
        "spread": (max(rates) - min(rates)) / middle,
        "times_the_model": middle / eaten,
    }


def estimate(loader: float, weights: float) -> dict[str, float]:
    """Tokens a second of a node, at 6 FLOPs a weight and token (Kaplan et al. 2020), and of the loader over that."""
    tokens = GPUS * H200_FLOPS * USED / (6 * weights)
    return {"tokens_per_s": tokens, "times": loader / tokens}


if __name__ == "__main__":
    main()
