"""Throughput of the loader from a large token file in random order, against a model's demand.

    python benchmarks/loader.py [--gigabytes N] [--memory-gigabytes 0] [--steps 200]
                                [--file PREFIX] [--json FILE]

The file is really written, not sparse. By default it is larger than the memory, so that the page
cache cannot hold it, and is deleted at the end; --file keeps it. Rows are read in GPT-NeoX's
shuffled order, so each is a random access. `cold` evicts the file from the page cache before each
round, so all rows come from the disk; `warm` reads the same rows again. --memory-gigabytes serves
containers with less memory than the machine. The model is a Pythia on this machine's processor,
forward and backward; the slowest case must be 50 times as fast. The tokens a second of a node of 8
H200 are an estimate: 989 TFLOP/s each in bf16, half of it used. Such a node runs one loader per
GPU; the rate here is that of one loader.
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
SEQ_LENGTH = 2048
BATCH = 64
DOCUMENT = 1400
"""Tokens in a document, about the mean of the Pile."""
PIECE = 12_000
"""Documents written at a time, 34 MB."""
H200_FLOPS = 989e12
"""Dense bf16, from NVIDIA's data sheet."""
USED = 0.5
"""Assumed fraction of it that training reaches."""
GPUS = 8
LEAST = 50
"""Required ratio of the loader's rate to the model's."""
OVER = 1.1
"""Size of the file over that of the memory."""
SPARE = 8e9
"""Bytes of the disk to leave free."""
SUITE = {"pythia-70m": 70e6, "pythia-1b": 1.01e9, "pythia-12b": 11.8e9}


def main() -> None:
    """Write the file, read it, delete it; run the model; print a table, write JSON."""
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
        rates = machine.in_turn(works, options.rounds)
    finally:
        if options.file is None:
            shutil.rmtree(folder)
    eaten = model_rate(options.model, options.model_rows)
    cases = {name: case(values, eaten) for name, values in rates.items()}
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
        raise SystemExit(f"the slowest case is {slowest:.1f} times the model; expected {LEAST}")


def show(record: dict[str, Any], memory: float) -> None:
    """The table."""
    print(f"{record['model']} uses {record['model_rows_per_s']:,.1f} rows/s here; ", end="")
    print(f"the file has {record['bytes'] / 1e9:.2f} GB, the memory {memory / 1e9:.1f} GB", end="")
    print("" if record["larger_than_memory"] else ": the page cache may hold it")
    print(f"{'case':<20}{'rows/s':>12}{'MB/s':>10}{'spread':>8}{'x model':>10}")
    for name, line in record["cases"].items():
        print(
            f"{name:<20}{line['rows_per_s']:>12,.0f}{line['mb_per_s']:>10,.1f}"
            f"{line['spread']:>8.2f}{line['times_the_model']:>10,.0f}"
        )
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
        "--file", type=Path, help="prefix of a file to keep; reused if large enough"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "loader.json")
    return parser.parse_args()


def make_file(prefix: Path, size: int) -> int:
    """Write a token file of at least `size` bytes of repeated random u16 ids; return its size.

    An existing file that is large enough is reused.
    """
    from castalia.data import IndexedDatasetWriter

    path = prefix.with_name(prefix.name + ".bin")
    if path.exists() and path.stat().st_size >= size:
        return path.stat().st_size
    # Repeating ids costs no time to draw, and the reader cannot tell.
    tokens = np.random.default_rng(0).integers(0, 50000, PIECE * DOCUMENT, np.uint16)
    written = 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while written < size:
            writer.add_many(tokens, np.full(PIECE, DOCUMENT))
            written += tokens.nbytes
    return path.stat().st_size


def read_rows(prefix: Path, steps: int, workers: int, cold: bool) -> float:
    """Rows a second of the loader over `steps` steps, after the start of workers and one batch."""
    from castalia.data import DataConfig, StepLoader, build_rows

    if cold:
        forget(prefix.with_name(prefix.name + ".bin"))
    config = DataConfig(seq_length=SEQ_LENGTH, train=[str(prefix)])
    sizes: dict[str, Any] = {"seed": 1234, "batch_size": BATCH, "steps": steps + 1}
    rows = build_rows(config, **sizes, eval_every=None, eval_batches=1).train
    # One step more than timed: the first pays for starting workers.
    batches = iter(StepLoader(rows, batch_size=BATCH, workers=workers, vocab_size=50304))
    next(batches)
    start = time.perf_counter()
    taken = sum(len(batch.tokens) for step in itertools.islice(batches, steps) for batch in step)
    spent = time.perf_counter() - start
    batches.close()
    return taken / spent


def forget(path: Path) -> None:
    """Evict the file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_rate(preset: str, rows: int) -> float:
    """Rows a second of a forward and backward pass on this machine, the median of three."""
    import torch

    from castalia.data import Batch
    from castalia.distributed import initialize
    from castalia.losses import NextToken, Scored
    from castalia.models import Decoder
    from castalia.models.init import start_weights
    from castalia.recipes import load_config

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
    """Median rate of a case, its spread (range over median), and its ratio to the model's rate."""
    middle = statistics.median(rates)
    return {
        "rows_per_s": middle,
        "mb_per_s": middle * (SEQ_LENGTH + 1) * 2 / 1e6,
        "spread": (max(rates) - min(rates)) / middle,
        "times_the_model": middle / eaten,
    }


def estimate(loader: float, weights: float) -> dict[str, float]:
    """Tokens a second of a node, and the loader's ratio to it.

    6 FLOPs per weight and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    tokens = GPUS * H200_FLOPS * USED / (6 * weights)
    return {"tokens_per_s": tokens, "times": loader / tokens}


if __name__ == "__main__":
    main()
