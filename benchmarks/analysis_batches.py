"""The batches of a run's steps: read, saved as numpy files, written as lines, counted over.

    python benchmarks/analysis_batches.py [--peer GPT-NEOX] [--tokens 1e8] [--steps 20]
                                          [--workers N] [--rounds 3] [--folder FOLDER] [--json FILE]

Pythia's shape: batches of 1,024 rows of 2,049 ids, from a token file of uint16 in GPT-NeoX's packed
and shuffled order, which the page cache holds. GPT-NEOX is a checkout of
github.com/EleutherAI/gpt-neox: the other side is its GPT2Dataset in torch's DataLoader with the
batches in order, and numpy.save, which is how Pythia's first viewer read and saved them. It gets
our index maps, so that both sides have the same order and neither builds it; the first batch of
both is compared. Neither side waits for the disk, and what one case left to write is written before
the next. Every round runs all cases in turn.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

from castalia.data import IndexedDatasetWriter
from castalia.stream.batches import hash_group, save_batches, verify_batches
from castalia.stream.batches_lines import custom_batches
from castalia.stream.batches_rows import lines_to_file, parquet_batches
from castalia.stream.opening import Stream, open_stream

HERE = Path(__file__).resolve().parent
BATCH = 1024
SEQ_LENGTH = 2048
VOCABULARY = 50_277
PIECE = 4000
"""Documents drawn at a time."""


def main() -> None:
    """Write the file, run all cases, print a table, write JSON."""
    options = read_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        record = measure(options, folder)
    show(record)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Batches a second, read and written.")
    parser.add_argument("--peer", type=Path, help="checkout of GPT-NeoX; without it, ours alone")
    parser.add_argument("--tokens", type=float, default=1e8, help="tokens of the file")
    parser.add_argument("--steps", type=int, default=20, help=f"batches of {BATCH} rows in a case")
    parser.add_argument("--workers", type=int, default=0, help="processes of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "analysis_batches.json")
    options = parser.parse_args()
    if options.peer is not None and not (options.peer / "megatron").is_dir():
        parser.error(f"{options.peer} is no checkout of GPT-NeoX")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Batches a second of every case; with a peer, ours over theirs."""
    tokens = make_file(folder / "text", int(options.tokens))
    most = (tokens - 1) // SEQ_LENGTH // BATCH
    steps = range(min(options.steps, most))
    words = ["pythia-160m", f"data.train=[{folder / 'text'}]", f"train.steps={len(steps)}"]
    stream = open_stream([*words, f"output={folder / 'run'}"], lambda line: None)
    # Hashes to compare with, as a run would have written them.
    with_hashes = write_hashes(stream, folder / "run", steps)
    cases = our_cases(with_hashes, folder / "ours", steps, options.workers)
    if options.peer is not None:
        loader = peer_loader(options.peer, stream, steps, options.workers)
        first = next(iter(loader))["text"].numpy()
        assert np.array_equal(first, next(stream.batches(steps)).block.tokens), "other rows"
        cases |= peer_cases(loader, folder / "theirs")
    times = machine.in_turn(cases, options.rounds)
    rates = {
        name: machine.summary(len(steps) / value for value in values)
        for name, values in times.items()
    }
    record = {"machine": machine.describe(), "tokens": tokens, "steps": len(steps)}
    record |= {"rows": BATCH, "workers": options.workers, "batches_per_s": rates}
    pairs = {"read": "neox read", "save": "neox save"}
    record["ratios"] = {
        ours: machine.ratio(times[theirs], times[ours])
        for ours, theirs in pairs.items()
        if theirs in times
    }
    return record


def make_file(prefix: Path, wanted: int) -> int:
    """Write a token file of at least so many random ids, in documents as long as the Pile's."""
    random = np.random.default_rng(0)
    tokens = 0
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while tokens < wanted:
            sizes = np.minimum(random.lognormal(6.0, 1.4, PIECE).astype(int) + 2, 100_000)
            writer.add_many(random.integers(0, VOCABULARY, int(sizes.sum())), sizes)
            tokens += int(sizes.sum())
    return tokens


def write_hashes(stream: Stream, run: Path, steps: range) -> Stream:
    """The stream as that of a run in a folder, whose metrics have the hashes of its rows."""
    run.mkdir()
    lines = [{"step": step + 1, "rows_hash": value} for step, value in hash_group(stream, steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return replace(stream, folder=run)


def of_batch(batch: np.ndarray, step: int) -> dict[str, Any]:
    """A statistic that costs about as much as reading the batch."""
    return {"zeros": int((batch == 0).sum()), "mean": float(batch.mean())}


def our_cases(
    stream: Stream, folder: Path, steps: range, workers: int
) -> dict[str, Callable[[], float]]:
    """Seconds of each of our forms, each time into an empty folder."""
    function = "analysis_batches:of_batch"

    def reading() -> None:
        for _ in stream.batches(steps):
            pass

    def emptied(work: Callable[[], object]) -> Callable[[], float]:
        def case() -> float:
            empty(folder)
            return machine.seconds(work)

        return case

    def saving() -> None:
        save_batches(stream, steps, folder, workers=workers)

    works: dict[str, Callable[[], object]] = {
        "read": reading,
        "verify": lambda: verify_batches(stream, steps, workers=workers),
        "save": saving,
        "custom": lambda: custom_batches(
            stream, steps, function, folder / "stats.jsonl", workers=workers
        ),
        "jsonl": lambda: lines_to_file(stream, steps, None, folder / "rows.jsonl", workers=workers),
        "parquet": lambda: parquet_batches(stream, steps, folder / "tables", workers=workers),
    }
    return {name: emptied(work) for name, work in works.items()}


def empty(folder: Path) -> None:
    """Make a folder empty, and let no case pay for what the one before has left to write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


def peer_loader(peer: Path, stream: Stream, steps: range, workers: int) -> Any:
    """GPT-NeoX's data set in torch's loader, batch by batch in order, as its viewer had it."""
    indexed = peer_module(peer, "indexed_dataset")
    data = peer_module(peer, "gpt2_dataset")
    source = stream.rows.train.row_sources[0]
    tokens = indexed.MMapIndexedDataset(source.dataset.prefix, skip_warmup=True)
    documents = np.arange(len(source.dataset), dtype=np.int32)
    rows = data.GPT2Dataset(
        "train", source.dataset.prefix, documents, tokens, 0, 1, SEQ_LENGTH, 0,
        build_index_mappings=False,
    )  # fmt: skip
    for name in ("doc_idx", "sample_idx", "shuffle_idx"):
        setattr(rows, name, getattr(source.order, name))
    rows.shuffle_idx_len = len(rows.shuffle_idx) - 1
    rows.sample_idx_len = len(rows.sample_idx) - 1
    batches = [range(BATCH * step, BATCH * (step + 1)) for step in steps]
    return torch.utils.data.DataLoader(rows, batch_sampler=batches, num_workers=workers)


def peer_module(peer: Path, name: str) -> Any:
    """A module of GPT-NeoX's megatron/data, without the package's other imports."""
    package = ModuleType("megatron")
    package.print_rank_0 = print  # type: ignore[attr-defined]
    package.mpu = None  # type: ignore[attr-defined]
    sys.modules.setdefault("megatron", package)
    spec = importlib.util.spec_from_file_location(name, peer / "megatron" / "data" / f"{name}.py")
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_cases(loader: Any, folder: Path) -> dict[str, Callable[[], float]]:
    """Seconds of the viewer's two halves: the loader alone, and with numpy.save."""

    def reading() -> float:
        start = time.perf_counter()
        for _ in loader:
            pass
        return time.perf_counter() - start

    def saving() -> float:
        empty(folder)
        start = time.perf_counter()
        for step, batch in enumerate(loader):
            np.save(folder / f"batch{step}_bs{BATCH}.npy", batch["text"].numpy())
        return time.perf_counter() - start

    return {"neox read": reading, "neox save": saving}


def show(record: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{record['steps']} batches of {BATCH:,} x {SEQ_LENGTH + 1:,}; {record['workers']} workers"
    )
    print(f"{'case':<18}{'batches/s':>11}{'rows/s':>12}{'low':>8}{'high':>8}{'x neox':>8}")
    for name, rate in record["batches_per_s"].items():
        ratio = record["ratios"].get(name)
        times = f"{ratio['median']:8.2f}" if ratio else ""
        rows = rate["median"] * BATCH
        print(
            f"{name:<18}{rate['median']:>11.1f}{rows:>12,.0f}{rate['low']:>8.1f}"
            f"{rate['high']:>8.1f}{times}"
        )


if __name__ == "__main__":
    main()
