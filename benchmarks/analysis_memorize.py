"""Rows a second of `castalia memorize` against transformers' generate, on the same rows.

    python benchmarks/analysis_memorize.py [--shape pythia-14m] [--steps 40] [--rows 512]
    python benchmarks/analysis_memorize.py --run runs/suite/small-seed0 [--rows 512]

Without --run a model of the shape is trained for some steps on the machine's own text, since random
weights neither loop nor repeat as trained ones do. The reference is Pythia's scoring: `generate` of
32 tokens after 32, greedy, with a cache, in float32 and in bfloat16, each at its fastest batch
size. Ours runs four ways: scores alone, which is what the reference gives, scores with the loss,
and exactness with and without it. Sides run in turn, each in its own process; the scores of all
rows are compared. Near ties are counted apart: rounding decides them on either side.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine
from worker import Worker

HERE = Path(__file__).resolve().parent
SCRIPT = "analysis_memorize_engines.py"
PROMPT = 32
WINDOW = 64
LEAST = 10
"""Wanted ratio of the rows a second."""
OURS = ("scores", "scores and loss", "exact", "exact and loss")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Train, measure in turn, print a table, write JSON."""
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="castalia-memorize-") as name:
        record = measured(options, Path(name))
    show(record)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rows a second of memorization scores.")
    parser.add_argument("--run", help="a run of castalia train; by default one is trained")
    parser.add_argument("--shape", default="pythia-14m", help="preset of the model to train")
    parser.add_argument("--steps", type=int, default=40, help="steps that it trains")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--threads", type=int, default=0, help="by default all cores")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "analysis_memorize.json")
    return parser.parse_args()


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of one model."""
    from castalia.export.exports import export

    run = options.run or trained(options.shape, options.steps, folder / "run")
    rows = distinct_rows(run, options.rows)
    np.save(folder / "rows.npy", rows)
    list(export(run, output=folder / "hf"))
    threads = options.threads or machine.os.cpu_count()
    case = {"rows": str(folder / "rows.npy"), "prompt": PROMPT, "threads": threads}
    ours = Worker(SCRIPT, case | {"side": "ours", "model": str(run)})
    arithmetic = ours.answer()
    theirs = {}
    batches = {}
    for dtype in DTYPES:
        of_theirs = {"side": "reference", "model": str(folder / "hf"), "dtype": dtype}
        theirs[dtype] = Worker(SCRIPT, case | of_theirs | {"batches": options.batches})
        batches[dtype] = theirs[dtype].answer()
    works = {word: functools.partial(ours.ask, word) for word in OURS}
    works |= {dtype: functools.partial(side.ask, "scores") for dtype, side in theirs.items()}
    times = machine.in_turn(works, options.rounds)
    record = {
        "machine": machine.describe(),
        "model": str(options.run or options.shape),
        "rows": len(rows),
        "arithmetic": arithmetic,
        "reference_batch": batches,
        "rows_per_s": {
            name: machine.summary(len(rows) / each for each in spent)
            for name, spent in times.items()
        },
        "ratios": {
            word: {dtype: machine.ratio(times[dtype], times[word]) for dtype in DTYPES}
            for word in OURS
        },
        "scores": compared(rows, ours.ask("answers"), theirs["float32"].ask("answers")),
    }
    for side in (ours, *theirs.values()):
        side.tell("stop")
    return record


def trained(shape: str, steps: int, folder: Path) -> str:
    """A short run of a model of a preset's shape on the machine's text, that of `mini` on its
    own."""
    import castalia

    words = ["precision=fp32", "train.batch_size=8", "checkpoint.every=null", "checkpoint.steps=[]"]
    if shape != "mini":
        words += ["data.corpus=python", "data.seq_length=128"]
    castalia.train(shape, *words, steps=steps, output=str(folder))
    return str(folder)


def distinct_rows(run: str, count: int) -> np.ndarray:
    """The first windows of the run's rows, each once: equal ones would be computed once."""
    from castalia.stream.opening import open_stream

    stream = open_stream(run, lambda text: None)
    places = stream.places(0, stream.trained)
    windows = stream.block(places[: 2 * count]).tokens[:, :WINDOW]
    return np.unique(windows, axis=0)[:count]


def compared(rows: np.ndarray, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How many scores differ, and how many of those rows have a near tie."""
    true = rows[:, PROMPT:]
    ours_score = (np.array(ours["made"]) == true).mean(1)
    theirs_score = (np.array(theirs["made"]) == true).mean(1)
    differ = ours_score != theirs_score
    near = np.array(ours["near"])
    return {
        "mean": float(ours_score.mean()),
        "exact": int((ours_score == 1).sum()),
        "near_ties": int(near.sum()),
        "differ": int(differ.sum()),
        "differ_without_near_tie": int((differ & ~near).sum()),
    }


def show(record: dict[str, Any]) -> None:
    """The table."""
    print(f"{record['model']}: {record['rows']} rows, {record['arithmetic']}", end="")
    print(f", transformers at batches {record['reference_batch']}")
    print(f"{'':<20}{'rows/s':>10}{'x float32':>12}{'x bfloat16':>12}")
    for name, rate in record["rows_per_s"].items():
        line = f"{name:<20}{rate['median']:>10,.1f}"
        for dtype in DTYPES:
            if name in record["ratios"]:
                line += f"{record['ratios'][name][dtype]['median']:>12.1f}"
        print(line)
    print(f"scores: {record['scores']}")
    ratio = record["ratios"]["scores"]["float32"]["median"]
    if ratio < LEAST:
        print(f"scores alone: {ratio:.1f} times the reference; wanted {LEAST}")


if __name__ == "__main__":
    main()
