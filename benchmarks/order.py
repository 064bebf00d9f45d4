"""Time and memory of GPT-NeoX's sample order: 10 million documents, 100 million rows; and of a blend of 22 sources.

    python benchmarks/order.py [--documents N] [--rows N] [--json FILE]
    python benchmarks/order.py --pile [--documents N] [--rows N] [--json FILE]

Each case runs in a process of its own, so that its peak memory is its own. Two shapes of the same size: long documents
(one epoch) and short ones (many epochs, so the document index is larger than the rows'). `--pile` takes the shape of
the Pile alone, 210 million documents and 146 million rows, and fails if it needs more than 12 GB.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 2048
BLEND_ROWS = 147_164_160
"""What the order of Pythia's 143,000 steps of 1,024 rows asks for, with its margin."""
PILE_DOCUMENTS, PILE_ROWS = 210_000_000, 146_432_000
"""The Pile, and the 143,000 steps of 1,024 rows of Pythia."""
PILE_LIMIT_GB = 12.0
HERE = Path(__file__).resolve().parent
SHORT_SHARE = 10
"""Epochs of the case with short documents."""


def main() -> None:
    """Run every case in its own process, print a table, write JSON."""
    options = read_options()
    if options.case:
        print(json.dumps({**CASES, PILE: pile}[options.case](options.documents, options.rows)))
        return
    cases = {name: run_apart(name, options) for name in ([PILE] if options.pile else CASES)}
    print(f"{'case':<18}{'documents':>12}{'rows':>14}{'epochs':>8}{'seconds':>9}{'cpu s':>8}{'peak GB':>9}")
    for name, found in cases.items():
        print(
            f"{name:<18}{found['documents']:>12,}{found['rows']:>14,}{found['epochs']:>8}"
            f"{found['seconds']:>9.1f}{found['cpu_seconds']:>8.1f}{found['peak_gb']:>9.2f}"
        )
    worst = max(found["peak_gb"] for found in cases.values())
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"machine": machine(), "seq_length": SEQ_LENGTH, "cases": cases}, indent=1) + "\n"
    )
    if options.pile and worst > PILE_LIMIT_GB:
        raise SystemExit(f"peak {worst} GB, more than {PILE_LIMIT_GB} GB")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of the sample order.")
    parser.add_argument("--pile", action="store_true", help="the shape of the Pile alone")
    parser.add_argument("--documents", type=int, help="default 10 million, with --pile 210 million")
    parser.add_argument("--rows", type=int, help="default 100 million, with --pile 146 million")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=[*CASES, PILE])
    options = parser.parse_args()
    options.documents = options.documents or (PILE_DOCUMENTS if options.pile else 10_000_000)
    options.rows = options.rows or (PILE_ROWS if options.pile else 100_000_000)
    options.json = options.json or HERE / "results" / ("order_pile.json" if options.pile else "order.json")
    return options


def run_apart(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, f"--documents={options.documents}", f"--rows={options.rows}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def long_documents(documents: int, rows: int) -> dict[str, Any]:
    """One epoch holds all rows."""
    return build(documents, rows, epochs=1)


def short_documents(documents: int, rows: int) -> dict[str, Any]:
    """Documents so short that they are read several times."""
    return build(documents, rows, epochs=SHORT_SHARE)


def build(documents: int, rows: int, epochs: int) -> dict[str, Any]:
    """The order over documents of log-normal length, whose mean makes `rows` rows in `epochs` epochs."""
    from castalia.data import NeoxOrder

    mean = 1.001 * rows * SEQ_LENGTH / documents / epochs
    raw = np.random.default_rng(0).lognormal(0.0, 1.0, documents)
    sizes = np.maximum(raw * (mean / raw.mean()), 1).astype(np.int32)
    del raw
    start = now()
    order = NeoxOrder(sizes, seq_length=SEQ_LENGTH, num_samples=rows, seed=1234)
    spent = since(start)
    assert len(order.shuffle_idx) >= rows
    return measured(spent, documents, len(order.shuffle_idx), order.epochs)


def blend_of_22(documents: int, rows: int) -> dict[str, Any]:
    """As many sources as the Pile has; the documents do not matter here."""
    from castalia.data import blend

    weights = np.random.default_rng(0).dirichlet(np.ones(22)).tolist()
    rows = BLEND_ROWS * rows // 100_000_000
    start = now()
    blend(weights, rows)
    return measured(since(start), 0, rows, 0)


def pile(documents: int, rows: int) -> dict[str, Any]:
    """One pass over the Pile; its sizes are made in pieces, so that the peak is the order's and not theirs."""
    from castalia.data import NeoxOrder

    random, piece = np.random.default_rng(0), 1 << 20
    mean = 1.002 * rows * SEQ_LENGTH / documents
    sizes = np.empty(documents, np.int32)
    for first in range(0, documents, piece):
        drawn = random.lognormal(np.log(mean) - 0.5, 1.0, min(piece, documents - first))  # exp(mu + 1/2) is the mean
        sizes[first : first + piece] = np.maximum(drawn, 1)
    start = now()
    order = NeoxOrder(sizes, seq_length=SEQ_LENGTH, num_samples=rows, seed=1234)
    spent = since(start)
    assert len(order.shuffle_idx) >= rows
    return measured(spent, documents, len(order.shuffle_idx), order.epochs)


PILE = "pile"
CASES = {"long documents": long_documents, "short documents": short_documents, "blend of 22": blend_of_22}


def now() -> tuple[float, float]:
    """Wall clock and this process's time on the cores; the second says more on a machine that others use."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since `start`, by both clocks."""
    wall, cpu = now()
    return {"seconds": round(wall - start[0], 2), "cpu_seconds": round(cpu - start[1], 2)}


def measured(spent: dict[str, float], documents: int, rows: int, epochs: int) -> dict[str, Any]:
    """One line of the table; the peak is the whole process's, Python and numpy included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "documents": documents,
        "rows": rows,
        "epochs": epochs,
        **spent,
        "peak_gb": round(peak, 3),
    }


def machine() -> dict[str, Any]:
    """Where it ran."""
    names = [line.split(":")[1].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_at_start": os.getloadavg()[0],
    }


def read(path: str) -> str:
    """A file of the system, or nothing where it does not exist."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
