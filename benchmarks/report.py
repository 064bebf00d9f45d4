"""The report of a long run with many sources, and of a results table with a million rows.

    python benchmarks/report.py [--steps 143000] [--sources 22] [--rows 1000000] [--json FILE]

The run has metrics.jsonl and mixture.jsonl in the form that training writes, a line for every step,
with noise in every number. The table has the shape of Pythia's results: 16 models at 154
checkpoints, accuracies of a finite number of documents and their standard errors. Printed for each
page: seconds to write it, bytes of the file, seconds until it is ready in a headless Chromium
(from the first byte that is read; median and quartiles over --opens), seconds until a change of
task and of axis is drawn, and the JavaScript heap after them. Needs playwright and a Chromium.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

HERE = Path(__file__).resolve().parent
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
MODELS = 16
EARLY = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEPS = (*EARLY, *range(1000, 144_000, 1000))
"""Pythia's 154 checkpoints."""
METRICS = ("acc", "acc_norm")
TASKS = (
    *("lambada_openai", "piqa", "winogrande", "arc_easy", "arc_challenge", "sciq", "logiqa"),
    *(f"hendrycksTest-subject_{place}" for place in range(57)),
    *(f"blimp_phenomenon_{place}" for place in range(67)),
)
TOKENS_PER_STEP = 2_097_152


def main() -> None:
    """Make the run and the table, write and open both pages, print and write the numbers."""
    options = read_options()
    record: dict[str, Any] = {"machine": machine.describe()}
    with tempfile.TemporaryDirectory(prefix="castalia-report-") as folder:
        run = Path(folder) / "long"
        make_run(run, options.steps, options.sources)
        table = Path(folder) / "table"
        rows = make_table(table, options.rows)
        record["run"] = {"steps": options.steps, "sources": options.sources}
        record["table"] = {"rows": rows, "tasks": len(TASKS), "models": MODELS}
        with browser() as chromium:
            for name, path, changes in (("run", run, RUN_CHANGES), ("table", table, TABLE_CHANGES)):
                record[name] |= measure(chromium, path, changes, options.opens)
                show(name, record[name])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and size of large report pages.")
    parser.add_argument("--steps", type=int, default=143_000, help="steps of the run")
    parser.add_argument("--sources", type=int, default=22)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the results table")
    parser.add_argument("--opens", type=int, default=5, help="times that each page is opened")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "report.json")
    return parser.parse_args()


def make_run(folder: Path, steps: int, count: int) -> None:
    """A run's metrics.jsonl, by a formula with noise, and its mixture.jsonl, by a mixer."""
    from castalia.mixing import MixtureLog, Planner, Stats, make_mixer

    folder.mkdir(parents=True)
    names = [f"source_{place:02}" for place in range(count)]
    mixer = make_mixer("odm", sources=names, eps=0.1 / count)
    planner = Planner(mixer, sizes=np.arange(count) * 10_000 + 10_000, rows=64, seed=1)
    log = MixtureLog(folder / "mixture.jsonl", planner)
    random = np.random.default_rng(0)
    levels = np.linspace(1.5, 3.0, count)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            losses = levels + 8.0 / step**0.5 + 0.05 * random.standard_normal(count)
            plan = planner.plan(step)
            stats = Stats(step, losses * plan.counts, plan.counts)
            planner.observe(stats)
            log.write(plan, stats)
            read = [place for place in range(count) if plan.counts[place]]
            line = line_of(step, float(losses.mean()), random)
            line["sources"] = {
                names[place]: {"loss": float(losses[place]), "tokens": int(plan.counts[place])}
                for place in read
            }
            file.write(json.dumps(line) + "\n")
    log.close()


def line_of(step: int, loss: float, random: np.random.Generator) -> dict[str, Any]:
    """The numbers of a step beside those by source; a validation every 1,000 steps."""
    noise = random.standard_normal(4)
    line: dict[str, Any] = {
        "step": step,
        "loss": loss,
        "lr": 1e-3 * (1.1 - step / 143_000),
        "grad_norm": float(1.0 + 0.1 * noise[0]),
        "tokens": TOKENS_PER_STEP * step,
        "time": 1e9 + 0.5 * step,
        "step_seconds": float(0.5 + 0.01 * abs(noise[1])),
        "data_seconds": float(0.001 * abs(noise[2])),
        "tokens_per_second": float(TOKENS_PER_STEP * (2 + 0.02 * noise[3])),
        "memory_bytes": 2**33,
    }
    if step % 1000 == 0:
        line["valid_loss"] = loss + 0.02
    return line


def make_table(folder: Path, rows: int) -> int:
    """A results table; returns its rows, `rows` or somewhat more."""
    from castalia.results.store import FILE, ResultsStore, arrow_schema, table_of

    arrow = __import__("pyarrow")
    parquet = __import__("pyarrow.parquet", fromlist=["parquet"])
    random = np.random.default_rng(0)
    each = MODELS * len(STEPS) * len(METRICS)
    pairs = [(task, shots) for shots in (0, 5, 10, 25) for task in TASKS]
    pairs = pairs[: -(-rows // each)]
    model = np.tile(np.repeat(np.arange(MODELS), len(STEPS)), len(pairs) * len(METRICS))
    step = np.tile(np.array(STEPS), MODELS * len(pairs) * len(METRICS))
    pair = np.repeat(np.arange(len(pairs)), each)
    metric = np.tile(np.repeat(np.arange(len(METRICS)), MODELS * len(STEPS)), len(pairs))
    documents = random.integers(100, 10_000, len(pairs))[pair]
    share = 0.25 + 0.03 * model * np.log1p(step) / np.log(143_001) + 0.05 * metric
    value = random.binomial(documents, share) / documents
    parameters = (7e7 * 2.0 ** np.arange(MODELS)).astype(int)
    columns: dict[str, Any] = {
        "suite": np.full(len(model), "bench"),
        "model": np.array([f"bench-{count // 10**6}m" for count in parameters])[model],
        "variant": np.full(len(model), ""),
        "parameters": parameters[model],
        "step": step,
        "last_step": np.full(len(model), STEPS[-1]),
        "tokens": step * TOKENS_PER_STEP,
        "task": np.array([task for task, _ in pairs])[pair],
        "metric": np.array(METRICS)[metric],
        "filter": np.full(len(model), "none"),
        "shots": np.array([shots for _, shots in pairs])[pair],
        "value": value,
        "stderr": np.sqrt(value * (1 - value) / (documents - 1)),
        "documents": documents,
        "harness": np.full(len(model), "lm-eval 0.4.13"),
    }
    schema = arrow_schema()
    filled = {
        name: columns.get(name, arrow.nulls(len(model), schema.field(name).type))
        for name in table_of([]).column_names
    }
    folder.mkdir()
    parquet.write_table(arrow.table(filled, schema=schema), folder / FILE, compression="zstd")
    return int(ResultsStore(folder).table().num_rows)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


READY = "() => document.documentElement.dataset.ready === 'yes'"
DRAWN = """() => { const { turn, curves } = document.getElementById('scores').dataset;
  return turn && turn === curves; }"""
PICK = (
    """(name) => { document.querySelector(`input[name=${name}]:not(:checked):enabled`).click(); }"""
)
RUN_CHANGES = {"axis": "x", "scale": "xscale"}
TABLE_CHANGES = {"axis": "scores-axis", "scale": "scores-scale"}
"""What is changed -> the name of the radio buttons."""


def measure(chromium: Any, path: Path, changes: dict[str, str], opens: int) -> dict[str, Any]:
    """Write the page of a path, open it, change what it shows."""
    from castalia.analysis import write_report

    start = time.perf_counter()
    file = write_report(path)
    numbers: dict[str, Any] = {"write_s": time.perf_counter() - start}
    numbers["bytes"] = file.stat().st_size
    seconds: list[float] = []
    for _ in range(opens):
        page = chromium.new_context(viewport={"width": 1280, "height": 800}).new_page()
        start = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_function(READY, timeout=120_000)
        seconds.append(time.perf_counter() - start)
        if len(seconds) < opens:
            page.context.close()
    numbers["open_s"] = machine.summary(seconds)
    has_scores = page.locator("#scores").count() > 0
    numbers["change_s"] = {
        name: change(page, radios, has_scores) for name, radios in changes.items()
    }
    if has_scores:
        numbers["change_s"]["task"] = other_task(page)
    numbers["heap_bytes"] = heap_of(page)
    page.context.close()
    return numbers


def change(page: Any, radios: str, has_scores: bool, rounds: int = 4) -> float:
    """Median seconds from the click on another choice until the charts on the screen are drawn."""
    seconds: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        page.evaluate(PICK, radios)
        if has_scores:
            page.wait_for_function(DRAWN)
        # The frame after the charts: what is drawn can be seen.
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => done(0)))")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def other_task(page: Any, tasks: tuple[str, ...] = ("sciq", "piqa", "blimp", "hendrycks")) -> float:
    """Median seconds from Enter in the search until a task that was not yet unpacked is drawn."""
    seconds: list[float] = []
    search = page.get_by_role("combobox", name="search for a task")
    for task in tasks:
        search.fill(task)
        start = time.perf_counter()
        search.press("Enter")
        page.wait_for_function(DRAWN)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def heap_of(page: Any) -> int:
    """Bytes of the JavaScript heap in use after a collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    return int(next(each["value"] for each in metrics if each["name"] == "JSHeapUsedSize"))


def show(name: str, numbers: dict[str, Any]) -> None:
    """A line a page."""
    changes = ", ".join(f"{key} {value:.2f} s" for key, value in numbers["change_s"].items())
    print(
        f"{name}: written in {numbers['write_s']:.1f} s, {numbers['bytes'] / 1e6:.2f} MB, open in"
        f" {numbers['open_s']['median']:.2f} s; change of {changes};"
        f" heap {numbers['heap_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
