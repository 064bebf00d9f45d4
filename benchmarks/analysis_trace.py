"""Where a text stood in the stream: building the index, asking it, and reading without one.

    python benchmarks/analysis_trace.py [--tokens 1e6 1e7 1e8] [--workers N] [--folder FOLDER]
                                        [--json FILE]

For each size a token file of documents with Zipf-distributed ids is written, into which texts of
20 tokens are planted: some once, some many times. The stream is one pass over the file in rows of
2,048 tokens. A query is the whole answer within a process that has the stream open: binary searches
in the index, the steps and rows of every place, and rows read back and compared. `first` is the
first query but one; each of the others is for a text that was not asked for before. `files` reads
the token file from front to back, `rows` reads the rows as the steps did (`castalia trace --scan`),
and `command` is the whole of `castalia trace`, with the start of Python. Every answer is compared
with what was planted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
VOCABULARY = 50_000
DOCUMENT = 1400
"""Tokens of a document, about the mean of the Pile."""
PIECE = 4000
"""Documents drawn at a time."""
TEXT = 20
"""Tokens of a planted text."""
ONCE = 200
"""Texts planted once."""
OFTEN = 20
"""Texts planted many times."""
TIMES = 200
"""How many times, in a million tokens or more."""
SEQ_LENGTH = 2048
BATCH = 16
MARGIN = 0.1
"""Share of a text's places that may be in the rows that fill no batch."""
LIMIT_INDEX = 0.1
"""Seconds within which the index answers for a text that stands once."""
LIMIT_SCAN = 30.0
"""Seconds within which a scan does."""


def main() -> None:
    """Measure each size, print a table, write JSON."""
    options = read_options()
    record = {"machine": machine.describe(), **measure(options.tokens, options)}
    show(record["sizes"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    slow = [
        size
        for size, line in record["sizes"].items()
        if line["once"]["p99_s"] > LIMIT_INDEX or line["rows_s"] > LIMIT_SCAN
    ]
    if slow:
        raise SystemExit(f"too slow at {', '.join(slow)} tokens")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Index build and queries of castalia trace.")
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="for the files; by default a temporary one")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "analysis_trace.json")
    return parser.parse_args()


def measure(sizes: Sequence[float], options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of each size, by its tokens."""
    lines = {}
    for size in sizes:
        folder = Path(tempfile.mkdtemp(prefix="castalia-trace-", dir=options.folder))
        try:
            lines[f"{size:.0e}"] = measure_size(folder, int(size), options.workers)
        finally:
            shutil.rmtree(folder)
    return {"text_tokens": TEXT, "workers": options.workers, "sizes": lines}


def measure_size(folder: Path, tokens: int, workers: int) -> dict[str, Any]:
    """The numbers of one size."""
    from castalia.data import IndexedDataset
    from castalia.stream import Tracer, build_index, open_stream

    prefix = folder / "corpus"
    once, often = write_file(prefix, tokens)
    words = config_of(prefix, folder)
    plain = Tracer(open_stream(words, lambda line: None))
    files_s = [timed(lambda ids=ids: ask(plain, ids, 1)) for ids in once[:3]]
    rows_s = timed(lambda: ask(plain, once[0], 1, rows=True))
    built = build_index(IndexedDataset(prefix), workers=workers)

    start = time.perf_counter()
    tracer = Tracer(open_stream(words, lambda line: None))
    opening = time.perf_counter() - start
    assert ask(tracer, once[0], 1).how == "index"
    first = timed(lambda: ask(tracer, once[1], 1))
    once_s = [timed(lambda ids=ids: ask(tracer, ids, 1)) for ids in once[2:]]
    often_s = [timed(lambda ids=ids: ask(tracer, ids, TIMES)) for ids in often]
    return {
        "tokens": built["tokens"],
        "parts": built["parts"],
        "build_s": built["seconds"],
        "build_tokens_per_s": round(built["tokens"] / built["seconds"]),
        "bytes_per_token": built["bytes"] / built["tokens"],
        "opening_s": opening,
        "first_s": first,
        "once": spread(once_s),
        "often": spread(often_s),
        "files_s": statistics.median(files_s),
        "rows_s": rows_s,
        "command_s": timed(lambda: command(words, once[3])),
    }


def write_file(prefix: Path, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Write the token file; returns the texts planted once, and those planted TIMES times."""
    from castalia.data import IndexedDatasetWriter

    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY)
    edges = np.cumsum(shares / shares.sum())
    documents = max(tokens // DOCUMENT, ONCE + OFTEN)
    texts = draw(random, edges, (ONCE + OFTEN) * TEXT).reshape(-1, TEXT)
    numbers = np.concatenate([np.arange(ONCE), np.repeat(np.arange(ONCE, len(texts)), TIMES)])
    # Slots, so that no text is written over another one.
    slots = random.permutation(documents * (DOCUMENT // 64))[: len(numbers)]
    homes, places = np.divmod(slots, DOCUMENT // 64)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for first in range(0, documents, PIECE):
            count = min(PIECE, documents - first)
            ids = draw(random, edges, count * DOCUMENT).reshape(count, DOCUMENT)
            ids[:, -1] = 0
            own = np.flatnonzero((homes >= first) & (homes < first + count))
            columns = places[own, None] * 64 + np.arange(TEXT)
            ids[homes[own, None] - first, columns] = texts[numbers[own]]
            writer.add_many(ids.reshape(-1), np.full(count, DOCUMENT))
    return texts[:ONCE].tolist(), texts[ONCE:].tolist()


def draw(random: np.random.Generator, edges: NDArray[Any], count: int) -> NDArray[np.uint16]:
    """So many ids >= 1 of a Zipf distribution."""
    ids = np.searchsorted(edges, random.random(count)) + 1
    return np.minimum(ids, VOCABULARY - 1).astype(np.uint16)


def config_of(prefix: Path, folder: Path) -> list[str]:
    """The words of a run that reads the file once."""
    words = ["debug", "data.corpus=null", "data.tokenizer=null", f"data.train=[{prefix}]"]
    words += [f"data.seq_length={SEQ_LENGTH}", f"model.max_position_embeddings={SEQ_LENGTH}"]
    words += ["data.valid=[]", "train.eval_every=null"]
    words += [f"model.vocab_size={VOCABULARY}", f"output={folder / 'run'}"]
    return [*words, f"train.batch_size={BATCH}", "train.epochs=1"]


def ask(tracer: Any, ids: list[int], planted: int, rows: bool = False) -> Any:
    """Ask for a text and check the answer against what was planted.

    The token files have it all; rows that fill no batch are served to no step.
    """
    found = tracer(ids=ids, rows=rows)
    if not rows:
        assert found.in_files == planted, (found.in_files, planted)
        assert planted - MARGIN * planted - 1 <= len(found) + found.split <= planted
    return found


def command(words: list[str], ids: list[int]) -> None:
    """`castalia trace` as a process of its own."""
    numbers = ",".join(map(str, ids))
    line = [sys.executable, "-m", "castalia", "trace", *words, "--ids", numbers, "--json"]
    subprocess.run(line, check=True, capture_output=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that work takes."""
    return machine.seconds(work)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile of queries."""
    return {
        "queries": len(seconds),
        "median_s": statistics.median(seconds),
        "p99_s": float(np.quantile(seconds, 0.99)),
    }


def show(sizes: dict[str, dict[str, Any]]) -> None:
    """The table."""
    print(f"{'tokens':>12}{'build tok/s':>14}{'bytes/tok':>11}{'once ms':>9}{'p99':>7}", end="")
    print(f"{f'{TIMES} hits ms':>14}{'files s':>9}{'rows s':>8}{'command s':>11}")
    for line in sizes.values():
        once = line["once"]
        print(
            f"{line['tokens']:>12,}{line['build_tokens_per_s']:>14,}{line['bytes_per_token']:>11.2f}"
            f"{1e3 * once['median_s']:>9.2f}{1e3 * once['p99_s']:>7.1f}"
            f"{1e3 * line['often']['median_s']:>14.2f}{line['files_s']:>9.3f}{line['rows_s']:>8.2f}"
            f"{line['command_s']:>11.2f}"
        )


if __name__ == "__main__":
    main()
