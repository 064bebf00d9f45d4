"""Time and memory of GPT-NeoX's sample order, and of a blend of 22 sources; beside Megatron-core.

    python benchmarks/order.py [--documents N] [--rows N] [--megatron DIR] [--rounds N]
                               [--json FILE]
    python benchmarks/order.py --quick
    python benchmarks/order.py --pile [--documents N] [--rows N] [--folder DIR] [--json FILE]

By default 10 million documents and 100 million rows. Each case runs in a process of its own, which
separates the peaks of memory. Two shapes have the same size: long documents (one epoch) and short
ones (many epochs, so that the document index is larger than that of the rows).

Beside them the same maps of 10 million documents and 10.7 million rows, in one epoch, are built
here and by Megatron-core's GPTDataset, in turn, in memory, and compared. `grown GB` is the peak of
memory over that before the build. Megatron-core is imported, or taken from the folder --megatron,
made by

    pip install --no-deps --target DIR megatron-core triton

(version 0.17 and later need Python 3.12). Where it is absent, the table says so. --quick takes a
tenth of everything and two rounds.

--pile uses the shape of the Pile, 210 million documents and 146 million rows, in a token file with
a real .idx (4 GB) and a sparse .bin. Cases: the order alone, in memory; from `build_rows` to the
first batch of 1,024 rows without stored index maps; the same with the maps stored by that run, once
as the page cache is, and once after .idx and maps were evicted from it. The benchmark fails if a
case needs more than 12 GB, or the first batch with stored maps more than 10 s.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LENGTH = 2048
BLEND_ROWS = 147_164_160
"""Rows that GPT-NeoX requests for Pythia's 143,000 steps of 1,024 rows, margin included."""
PILE_DOCUMENTS = 210_000_000
PILE_ROWS = 146_432_000
"""The 143,000 steps of 1,024 rows of Pythia."""
LIMIT_GB = 12.0
LIMIT_SECONDS = 10.0
BATCH = 1024
HERE = Path(__file__).resolve().parent
OURS = "castalia"
MEGATRON = "megatron-core"
PEER_DOCUMENTS = 10_000_000
PEER_ROWS = 10_700_000
QUICK_SHARE = 10
"""--quick divides all sizes by it."""
SHORT_SHARE = 10
"""Epochs of the case with short documents."""


def main() -> None:
    """Run every case in its own process, print a table, write JSON."""
    options = read_options()
    sys.path.insert(0, str(HERE))
    if options.case:
        print(json.dumps({**CASES, **PILE_CASES}[options.case](options)))
        return
    if options.pile:
        make_file(options)
    try:
        cases = {name: run_apart(name, options) for name in (PILE_CASES if options.pile else CASES)}
        kept = sum(path.stat().st_size for path in maps_folder(options).glob("*"))
    finally:
        if options.pile:
            shutil.rmtree(options.folder)
    print(
        f"{'case':<28}{'documents':>12}{'rows':>14}{'epochs':>8}{'seconds':>9}{'cpu s':>8}"
        f"{'peak GB':>9}"
    )
    for name, case in cases.items():
        print(
            f"{name:<28}{case['documents']:>12,}{case['rows']:>14,}{case['epochs']:>8}"
            f"{case['seconds']:>9.1f}{case['cpu_seconds']:>8.1f}{case['peak_gb']:>9.2f}"
        )
    record = {"machine": machine(), "seq_length": SEQ_LENGTH, "cases": cases}
    if not options.pile:
        record["beside Megatron-core"] = beside_megatron(options)
    if options.pile:
        print(f"kept index maps: {kept / 1e9:.2f} GB")
        record["kept_bytes"] = kept
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.pile:
        check_limits(cases)


def check_limits(cases: dict[str, dict[str, Any]]) -> None:
    """Fail if the shape of the Pile exceeds a limit."""
    if (worst := max(case["peak_gb"] for case in cases.values())) > LIMIT_GB:
        raise SystemExit(f"peak {worst} GB, more than {LIMIT_GB} GB")
    if (slowest := max(cases[name]["seconds"] for name in (KEPT, FORGOTTEN))) > LIMIT_SECONDS:
        raise SystemExit(
            f"{slowest} s to the first batch with kept index maps, more than {LIMIT_SECONDS} s"
        )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of the sample order.")
    parser.add_argument("--pile", action="store_true", help="the shape of the Pile alone")
    parser.add_argument("--documents", type=int, help="default 10 million, with --pile 210 million")
    parser.add_argument("--rows", type=int, help="default 100 million, with --pile 146 million")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folder", type=Path, help="with --pile, a new folder for 7 GB; removed at the end"
    )
    parser.add_argument("--megatron", type=Path, help="folder that has megatron-core")
    parser.add_argument("--rounds", type=int, default=5, help="beside Megatron-core")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, two rounds")
    cases = [*CASES, *PILE_CASES]
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.share = QUICK_SHARE if options.quick else 1
    options.rounds = 2 if options.quick else options.rounds
    documents, rows = (PILE_DOCUMENTS, PILE_ROWS) if options.pile else (10_000_000, 100_000_000)
    options.documents = options.documents or documents // options.share
    options.rows = options.rows or rows // options.share
    results = Path(tempfile.gettempdir()) if options.quick else HERE / "results"
    options.json = options.json or results / ("order-pile.json" if options.pile else "order.json")
    options.folder = options.folder or Path(tempfile.gettempdir()) / f"castalia-pile-{os.getpid()}"
    return options


def run_apart(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--case",
        case,
        f"--documents={options.documents}",
        f"--rows={options.rows}",
    ]
    command.append(f"--folder={options.folder}")
    result: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return result


def long_documents(options: argparse.Namespace) -> dict[str, Any]:
    """All rows in one epoch."""
    return build(options.documents, options.rows, epochs=1)


def short_documents(options: argparse.Namespace) -> dict[str, Any]:
    """Documents so short that all are read several times."""
    return build(options.documents, options.rows, epochs=SHORT_SHARE)


def build(documents: int, rows: int, epochs: int) -> dict[str, Any]:
    """The order over documents of log-normal length that make `rows` rows in `epochs` epochs."""
    from castalia.data import NeoxOrder

    # A little more than needed, so that rounding does not add an epoch.
    mean = 1.001 * rows * SEQ_LENGTH / documents / epochs
    raw = np.random.default_rng(0).lognormal(0.0, 1.0, documents)
    sizes = np.maximum(raw * (mean / raw.mean()), 1).astype(np.int32)
    del raw
    start = now()
    order = NeoxOrder(sizes, seq_length=SEQ_LENGTH, num_samples=rows, seed=1234)
    spent = since(start)
    assert len(order.shuffle_idx) >= rows
    return measured(spent, documents, len(order.shuffle_idx), order.epochs)


def blend_of_22(options: argparse.Namespace) -> dict[str, Any]:
    """As many sources as in the Pile; documents do not matter here."""
    from castalia.data import blend

    weights = np.random.default_rng(0).dirichlet(np.ones(22)).tolist()
    rows = BLEND_ROWS * options.rows // 100_000_000
    start = now()
    blend(weights, rows)
    return measured(since(start), 0, rows, 0)


def pile_order(options: argparse.Namespace) -> dict[str, Any]:
    """The order alone, over the sizes mapped from the .idx."""
    from castalia.data import IndexedDataset, NeoxOrder

    sizes = IndexedDataset(prefix(options)).sizes
    start = now()
    order = NeoxOrder(sizes, seq_length=SEQ_LENGTH, num_samples=options.rows, seed=1234)
    spent = since(start)
    assert len(order.shuffle_idx) >= options.rows
    return measured(spent, options.documents, len(order.shuffle_idx), order.epochs)


def first_batch(options: argparse.Namespace) -> dict[str, Any]:
    """From the path of a token file to its first batch, as at the start of a run."""
    from castalia.data import DataConfig, StepLoader, build_rows

    start = now()
    config = DataConfig(
        seq_length=SEQ_LENGTH, train=[prefix(options)], order_cache=str(maps_folder(options))
    )
    sizes: dict[str, Any] = {"seed": 1234, "batch_size": BATCH, "steps": options.rows // BATCH}
    rows = build_rows(config, **sizes, eval_every=None, eval_batches=1)
    batches = iter(StepLoader(rows.train, batch_size=BATCH, vocab_size=50304))
    (batch,) = next(batches)
    spent = since(start)
    batches.close()
    assert batch.tokens.shape == (BATCH, SEQ_LENGTH)
    return measured(spent, options.documents, len(rows.train), rows.epochs[0])


def forgotten_batch(options: argparse.Namespace) -> dict[str, Any]:
    """The first batch when .idx and maps must come from the disk."""
    for path in (Path(prefix(options) + ".idx"), *maps_folder(options).glob("*")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return first_batch(options)


def make_file(options: argparse.Namespace) -> None:
    """Write a token file of log-normal document lengths for one epoch; its .bin is sparse."""
    from castalia.data.indexed import write_index

    options.folder.mkdir(parents=True)
    with open(prefix(options) + ".idx", "wb") as file:
        write_index(file, np.dtype("<u2"), options.documents, lambda: drawn_sizes(options))
        os.fsync(file.fileno())
    tokens = sum(int(some.sum(dtype=np.int64)) for some in drawn_sizes(options))
    with open(prefix(options) + ".bin", "wb") as file:
        file.truncate(2 * tokens)


def drawn_sizes(options: argparse.Namespace) -> Iterator[Any]:
    """Document lengths, a million at a time."""
    random = np.random.default_rng(0)
    piece = 1 << 20
    mean = 1.01 * options.rows * SEQ_LENGTH / options.documents
    for first in range(0, options.documents, piece):
        # The mean of a log-normal distribution with sigma 1 is exp(mu + 1/2).
        drawn = random.lognormal(np.log(mean) - 0.5, 1.0, min(piece, options.documents - first))
        yield np.maximum(drawn, 1).astype(np.int32)


def prefix(options: argparse.Namespace) -> str:
    """Prefix of the token file in the shape of the Pile."""
    return str(options.folder / "pile")


def maps_folder(options: argparse.Namespace) -> Path:
    """Folder of its index maps."""
    return options.folder / "maps"


def beside_megatron(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of both sides, in turn, and their ratio round by round."""
    import machine as shared
    from worker import Worker

    documents = PEER_DOCUMENTS // options.share
    sizes = {"documents": documents, "rows": PEER_ROWS // options.share, "length": SEQ_LENGTH}
    folder = str(options.megatron) if options.megatron else None
    sides = {
        name: Worker("order_engines.py", {"side": name, "folder": folder, **sizes})
        for name in (OURS, MEGATRON)
    }
    ready = {name: side.answer() for name, side in sides.items()}
    if absent := ready[MEGATRON]["absent"]:
        print(f"{MEGATRON}: {absent}")
        sides[OURS].tell("stop")
        sides[MEGATRON].tell("stop")
        return {"absent": absent}
    # Not counted: compiles what is compiled once a machine.
    rounds = [
        {name: sides[name].ask("build") for name in turn(r)} for r in range(-1, options.rounds)
    ]
    for side in sides.values():
        side.tell("stop")
    same = len({each["digest"] for one in rounds for each in one.values()}) == 1
    rounds = rounds[1:]
    record: dict[str, Any] = {"same maps": same, **sizes}
    print(f"\n{rounds[0][OURS]['rows']:,} rows of {documents:,} documents; same maps: {same}")
    print(f"{'':<28}{'seconds':>24}{'grown GB':>10}")
    for name in sides:
        version = ready[name]["version"]
        seconds = shared.summary(each[name]["seconds"] for each in rounds)
        grown = max(each[name]["grown_gb"] for each in rounds)
        record[name] = {"version": version, "seconds": seconds, "grown_gb": grown}
        text = "{median:.2f} ({low:.2f}-{high:.2f})".format(**seconds)
        print(f"{name + ' ' + version:<28}{text:>24}{grown:>10.2f}")
    spent = [[each[name]["seconds"] for each in rounds] for name in sides]
    record["ours over theirs"] = shared.ratio(*spent)
    print("ours / theirs {median:.2f} ({low:.2f}-{high:.2f})".format(**record["ours over theirs"]))
    return record


def turn(number: int) -> list[str]:
    """The sides of a round: the first one changes."""
    return [OURS, MEGATRON] if number % 2 == 0 else [MEGATRON, OURS]


KEPT = "first batch, kept maps"
FORGOTTEN = "the same, from the disk"
CASES = {
    "long documents": long_documents,
    "short documents": short_documents,
    "blend of 22": blend_of_22,
}
PILE_CASES = {
    "the order alone": pile_order,
    "first batch, building": first_batch,
    KEPT: first_batch,
    FORGOTTEN: forgotten_batch,
}


def now() -> tuple[float, float]:
    """Wall clock and CPU time; the latter is more reliable on a shared machine."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since `start`, by both clocks."""
    wall, cpu = now()
    return {"seconds": round(wall - start[0], 2), "cpu_seconds": round(cpu - start[1], 2)}


def measured(spent: dict[str, float], documents: int, rows: int, epochs: int) -> dict[str, Any]:
    """One line of the table; the peak is that of the process, Python and numpy included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "documents": documents,
        "rows": rows,
        "epochs": epochs,
        **spent,
        "peak_gb": round(peak, 3),
    }


def machine() -> dict[str, Any]:
    """Description of the machine."""
    names = [
        line.split(":")[1].strip()
        for line in read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
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
    """A system file, or an empty text if it does not exist."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
