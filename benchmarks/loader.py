"""The loader alone: rows and bytes a second out of a large token file in random order, against what a model eats.

    python benchmarks/loader.py [--gigabytes 4] [--memory-gigabytes 0] [--steps 200] [--json FILE]

The file is of random ids and is made once, in the folder for temporary files unless --file says where. Its rows are
read in GPT-NeoX's shuffled order, so each is a random access. `cold` asks the kernel to forget the file before each
round. To be larger than the page cache the file must be larger than the memory; the script says whether it is.
`--memory-gigabytes` is that limit where a container has less than the machine. The model is a Pythia on this machine's
processor, forward and backward; for a node of 8 H200 the tokens a second are an estimate: 989 TFLOP/s each in bf16,
half of it used.
"""

import argparse
import itertools
import json
import os
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
PIECE = 1 << 24
H200_FLOPS, USED, GPUS = 989e12, 0.5, 8
"""Dense bf16 of NVIDIA's data sheet; the share that training reaches is assumed."""
SUITE = {"pythia-70m": 70e6, "pythia-1b": 1.01e9, "pythia-12b": 11.8e9}


def main() -> None:
    """Make the file, read it cold and warm by turns, run the model, print a table, write JSON."""
    options = read_options()
    bytes_ = make_file(options.file, int(options.gigabytes * 1e9))
    memory = options.memory_gigabytes * 1e9 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    works = {
        f"{name}, {workers} workers": (lambda workers=workers, cold=cold: read_rows(options, workers, cold))
        for workers in options.workers
        for name, cold in (("cold", True), ("warm", False))
    }
    found = machine.in_turn(works, options.rounds)
    eaten = model_rate(options.model, options.model_rows)
    cases = {name: case(rates, eaten) for name, rates in found.items()}
    print(f"{options.model} eats {eaten:,.1f} rows/s here; the file has {bytes_ / 1e9:.2f} GB", end="")
    print(", more than the memory" if bytes_ > memory else f", the memory {memory / 1e9:.1f} GB: it may be cached")
    print(f"{'case':<20}{'rows/s':>12}{'MB/s':>10}{'spread':>8}{'x model':>10}")
    for name, line in cases.items():
        print(f"{name:<20}{line['rows_per_s']:>12,.0f}{line['mb_per_s']:>10,.1f}{line['spread']:>8.2f}", end="")
        print(f"{line['times_the_model']:>10,.0f}")
    best = max(line["rows_per_s"] for line in cases.values()) * SEQ_LENGTH
    node = {name: estimate(best, weights) for name, weights in SUITE.items()}
    for name, line in node.items():
        print(f"{name} on {GPUS} H200, estimated: {line['tokens_per_s']:,.0f} tokens/s, loader {line['times']:.1f} x")
    record = {"machine": machine.describe(), "bytes": bytes_, "larger_than_memory": bytes_ > memory, "cases": cases}
    record |= {"model": options.model, "model_rows_per_s": eaten, "h200_node": node, "seq_length": SEQ_LENGTH}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rows and bytes a second of the loader.")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the token file, 10^9 bytes")
    parser.add_argument("--memory-gigabytes", type=float, default=0.0, help="memory that the page cache may use")
    parser.add_argument("--steps", type=int, default=200, help=f"steps of {BATCH} rows in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--model", default="pythia-14m")
    parser.add_argument("--model-rows", type=int, default=4)
    parser.add_argument(
        "--file", type=Path, default=Path(tempfile.gettempdir()) / "castalia-loader", help="prefix of the file"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loader.json")
    return parser.parse_args()


def make_file(prefix: Path, size: int) -> int:
    """A token file of at least `size` bytes of random u16 ids; one of that size that is there is kept. Its bytes."""
    from castalia.data import IndexedDatasetWriter

    path = prefix.with_name(prefix.name + ".bin")
    if path.exists() and path.stat().st_size >= size:
        return path.stat().st_size
    random, written = np.random.default_rng(0), 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while written < size:
            count = min(PIECE, -(-(size - written) // 2)) // DOCUMENT + 1
            writer.add_many(random.integers(0, 50000, count * DOCUMENT, np.uint16), np.full(count, DOCUMENT))
            written += 2 * count * DOCUMENT
    return path.stat().st_size


def read_rows(options: argparse.Namespace, workers: int, cold: bool) -> float:
    """Rows a second of the loader over `steps` steps; the first batch and the start of workers do not count."""
    from castalia.data import DataConfig, StepLoader, build_rows

    if cold:
        forget(options.file.with_name(options.file.name + ".bin"))
    config = DataConfig(seq_length=SEQ_LENGTH, train=[str(options.file)])
    sizes: dict[str, Any] = {"seed": 1234, "batch_size": BATCH, "steps": options.steps + 1}
    rows = build_rows(config, **sizes, eval_every=None, eval_batches=1).train
    steps = iter(StepLoader(rows, batch_size=BATCH, workers=workers, vocab_size=50304))
    next(steps)
    start = time.perf_counter()
    taken = sum(len(batch.tokens) for step in itertools.islice(steps, options.steps) for batch in step)
    spent = time.perf_counter() - start
    steps.close()
    return taken / spent


def forget(path: Path) -> None:
    """Ask the kernel to drop the file's pages."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_rate(preset: str, rows: int) -> float:
    """Rows a second of a forward and backward pass here, the median of three."""
    import torch

    from castalia.data import Batch
    from castalia.models import Decoder
    from castalia.recipes import load_config
    from castalia.train.loss import NextToken

    config = load_config([preset])
    model = Decoder(config.model)
    model.init_weights(0)
    ids = torch.randint(0, config.model.vocab_size, (rows, SEQ_LENGTH + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:].contiguous(), torch.zeros(rows, dtype=torch.int32), torch.arange(rows))
    loss = NextToken()
    spent = [machine.seconds(lambda: loss(model, batch).total.backward()) for _ in range(4)][1:]
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
