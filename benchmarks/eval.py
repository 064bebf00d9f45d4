"""Evaluation with lm-evaluation-harness: Castalia against the harness's own `hf` model, on a CPU.

    python benchmarks/eval.py            # Pythia-70M's shape and 27 checkpoints; on an idle machine
    python benchmarks/eval.py --quick    # a tiny model, to see that it runs

Weights are random and the same for both; the task files and their data are made up, see
eval_tasks.py. Four things are measured, all in float32 with the same batch and threads:

parity      every metric and error of every task: ours, hf, difference.
throughput  requests a second of each kind of task and over all: the time of the model's answers to
            all requests, their tokens included, without the data and the metrics. Both take their
            turn in each round; nothing is kept from one round to the next.
server      the same for requests of log-likelihood, the harness asking `castalia serve` (without
            options, in a process of its own) as docs/inference.md says: `local-completions`, one
            request of a batch at a time, with the server's tokenizer.
sweep       all checkpoints of a smaller model on some of the tasks, wall time of whole processes:
            `castalia eval RUN --steps all` once; `lm_eval --model hf` once for each checkpoint, as
            people run it; and `hf` for all checkpoints in one process whose tasks are loaded once.

`hf` reads the exported checkpoints; the time of exporting them is left out.
"""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from eval_tasks import KINDS, write_tasks
from machine import describe, in_turn, instructions, ratio, seconds, summary
from serving import start

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
TOKENIZER = ROOT.parent / "shared" / "data" / "20B_tokenizer.json"
"""GPT-NeoX's tokenizer; bytes take its place where it is not there."""
SWEPT = ["lambada", "choices", "minimal_pairs", "arithmetic"]
"""Tasks of the sweep."""


class Shape(NamedTuple):
    """The sizes of a model."""

    layers: int
    width: int
    heads: int
    length: int = 2048


SHAPES = {
    "70m": Shape(6, 512, 8),
    "14m": Shape(6, 128, 4),
    "tiny": Shape(2, 64, 4, 256),
}
"""70m and 14m are Pythia's: Biderman et al. 2023, arXiv:2304.01373, table 1, and the models'
pages."""
GOALS = {"throughput": 1.5, "server": 1.0, "sweep": 3.0}
"""Wanted ratios to `hf`."""


def write_run(folder: Path, shape: Shape, steps: list[int], tokenizer_text: str) -> list[Path]:
    """A run with random checkpoints; returns the Hugging Face export of each."""
    from castalia.checkpoint import Store
    from castalia.config import dump_yaml
    from castalia.distributed import initialize
    from castalia.export import export
    from castalia.models import Decoder, NeoxConfig
    from castalia.models.init import start_weights
    from castalia.runs.config import RunConfig
    from castalia.tokenizers.tokenizer import Tokenizer

    config = NeoxConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        vocab_size=Tokenizer(tokenizer_text).vocab_size,
        max_position_embeddings=shape.length,
        rotary_pct=0.25,
    )
    run = RunConfig(model=config, data={"seq_length": min(shape.length, 64)})
    files = {"config.yaml": dump_yaml(run), "tokenizer.json": tokenizer_text}
    exports = []
    for step in steps:
        model = Decoder(config)
        initialize(model, start_weights(config, step))
        generator = torch.Generator().manual_seed(step)
        tensors = {}
        for name, tensor in model.state_dict().items():
            # Start weights give every token nearly the same probability.
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[f"model.{name}"] = tensor.detach() + 0.02 * noise
        Store(folder / "checkpoints").save(step, tensors, {"step": step}, files, asynchronous=False)
        exports.append(folder.parent / f"{folder.name}-hf" / f"step{step}")
        list(export(folder / f"step{step}", to="hf", output=exports[-1]))
    return exports


def read_tokenizer() -> tuple[str, str]:
    """The text of the tokenizer and its name."""
    from castalia.tokenizers.tokenizer import load_tokenizer

    if TOKENIZER.is_file():
        return TOKENIZER.read_text(encoding="utf-8"), TOKENIZER.name
    return load_tokenizer("bytes").text, "bytes"


@contextlib.contextmanager
def silent() -> Any:
    """Without the harness's bars and lines."""
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        yield


def hf_model(folder: Path, batch: int) -> Any:
    """The harness's own model in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    with silent():
        return HFLM(str(folder), dtype="float32", device="cpu", batch_size=batch)


def hf_tasks(folder: Path, names: list[str]) -> Any:
    """Tasks as `lm_eval.simple_evaluate` makes them ready."""
    from lm_eval.tasks import TaskManager

    # The harness reads paths in a task's file relative to the current folder.
    with silent(), contextlib.chdir(folder):
        loaded = TaskManager(include_path=folder, include_defaults=False).load(names)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def measure_parity(ours: Any, theirs: Any, tasks: Any, loaded: Any, batch: int) -> dict[str, Any]:
    """Every number of both, and the largest difference, relative to values above 1."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    from castalia.eval import evaluate
    from castalia.eval.harness.numbers import metrics_of

    done = evaluate(ours, tasks, batch=batch, bootstrap=1000)
    with silent():
        want = harness_evaluate(theirs, loaded, bootstrap_iters=1000, log_samples=False)
    rows = []
    for task, values in want["results"].items():
        for metric, _, value, stderr in metrics_of(values):
            got = done[task, metric]
            row = {"task": task, "metric": metric, "ours": got.value, "hf": value}
            row |= {"ours_stderr": got.stderr, "hf_stderr": stderr}
            # Perplexities grow like the exponential of what was summed.
            scale = math.log if metric.endswith("perplexity") else float
            size = max(1.0, abs(scale(value)))
            row["difference"] = abs(scale(got.value) - scale(value)) / size
            rows.append(row)
    return {"rows": rows, "largest": max(row["difference"] for row in rows)}


def show_parity(record: dict[str, Any]) -> None:
    """The table of metrics."""
    print(f"\n{'task':<17}{'metric':<17}{'ours':>16}{'hf':>16}{'difference':>12}")
    for row in record["rows"]:
        values = f"{row['ours']:>16.9g}{row['hf']:>16.9g}{row['difference']:>12.1e}"
        print(f"{row['task']:<17}{row['metric']:<17}{values}")
    print(
        f"largest difference {record['largest']:.1e}; relative above 1; of logarithms of perplexity"
    )


def measure_throughput(
    ours: Any, theirs: Any, tasks: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of each kind of task in rounds, and the ratio."""
    from castalia.eval.harness.model import HarnessModel

    record: dict[str, Any] = {}
    for part in tasks.parts:
        (task,) = part.tasks.values()
        requests = list(task.instances)
        kind = requests[0].request_type

        def of_castalia(kind: str = kind, requests: list[Any] = requests) -> float:
            # A new model of the harness, which remembers neither tokens nor answers.
            model = HarnessModel(ours, batch=options.batch)
            return seconds(lambda: getattr(model, kind)(requests))

        def of_hf(kind: str = kind, requests: list[Any] = requests) -> float:
            with silent():
                return seconds(lambda: getattr(theirs, kind)(requests, disable_tqdm=True))

        times = in_turn({"castalia": of_castalia, "hf": of_hf}, options.rounds)
        record[part.name] = {
            "requests": len(requests),
            "rounds": times,
            "seconds": {name: summary(values) for name, values in times.items()},
            "ratio": ratio(times["hf"], times["castalia"]),
        }
        show_throughput(part.name, record[part.name])
    record["all"] = all_together(record)
    show_throughput("all", record["all"])
    return record


def all_together(record: dict[str, Any]) -> dict[str, Any]:
    """The sums over all kinds of tasks."""
    together: dict[str, list[float]] = {}
    for name in ("castalia", "hf"):
        by_round = zip(*(row["rounds"][name] for row in record.values()), strict=True)
        together[name] = [sum(each) for each in by_round]
    return {
        "requests": sum(row["requests"] for row in record.values()),
        "rounds": together,
        "seconds": {name: summary(values) for name, values in together.items()},
        "ratio": ratio(together["hf"], together["castalia"]),
    }


def show_throughput(name: str, row: dict[str, Any]) -> None:
    """One line a kind of task."""
    rates = [row["requests"] / row["seconds"][who]["median"] for who in ("castalia", "hf")]
    spread = f"{row['ratio']['low']:.2f}-{row['ratio']['high']:.2f}"
    print(
        f"{name:<17}{row['requests']:>6} requests   castalia {rates[0]:>8.1f}/s   hf"
        f" {rates[1]:>8.1f}/s   ratio {row['ratio']['median']:.2f} ({spread})",
        flush=True,
    )


def measure_server(
    run_folder: Path, theirs: Any, tasks: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the harness over the server and of `hf`, for tasks of log-likelihood."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    server = start(str(run_folder), argparse.Namespace(dtype="default", slots=16), options.port)
    address = f"http://127.0.0.1:{options.port}/v1/completions"
    record: dict[str, Any] = {}
    try:
        for part in tasks.parts:
            (task,) = part.tasks.values()
            requests = list(task.instances)
            if requests[0].request_type != "loglikelihood":
                continue

            def of_server(requests: list[Any] = requests) -> float:
                # A new model of the harness, which remembers nothing.
                with silent():
                    model = LocalCompletionsAPI(
                        base_url=address,
                        model=run_folder.name,
                        tokenizer_backend="remote",
                        tokenized_requests=True,
                        max_length=SHAPES[options.shape].length,
                        batch_size=options.batch,
                    )
                    return seconds(lambda: model.loglikelihood(requests, disable_tqdm=True))

            def of_hf(requests: list[Any] = requests) -> float:
                with silent():
                    return seconds(lambda: theirs.loglikelihood(requests, disable_tqdm=True))

            times = in_turn({"castalia": of_server, "hf": of_hf}, options.rounds)
            record[part.name] = {
                "requests": len(requests),
                "rounds": times,
                "seconds": {name: summary(values) for name, values in times.items()},
                "ratio": ratio(times["hf"], times["castalia"]),
            }
            show_throughput(part.name, record[part.name])
    finally:
        server.terminate()
        server.wait()
    record["all"] = all_together(record)
    show_throughput("all", record["all"])
    return record


def run(command: list[str], folder: Path) -> float:
    """Seconds of a process; its output is shown if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start


def measure_sweep(
    run_folder: Path, exports: list[Path], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Wall time of a sweep in three ways."""
    names = ",".join(SWEPT)
    batch = str(options.batch)
    ours = [sys.executable, "-m", "castalia", "eval", str(run_folder), "--steps", "all"]
    ours += ["--tasks", names, "--include", str(folder), "--batch", batch]
    theirs = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", names]
    theirs += ["--include_path", str(folder), "--batch_size", batch, "--device", "cpu"]
    together = [sys.executable, __file__, "--one-process", *map(str, exports)]
    together += ["--folder", str(folder), "--batch", batch, "--threads", str(options.threads)]
    record: dict[str, Any] = {"checkpoints": len(exports), "tasks": SWEPT, "seconds": {}}
    times: dict[str, float] = {}
    store = run_folder.parent / "evals"
    times["castalia eval"] = run([*ours, "--store", str(store)], folder)
    print(f"sweep of {len(exports)}: castalia eval {times['castalia eval']:.1f} s", flush=True)
    times["hf, one process"] = run(together, folder)
    print(f"sweep of {len(exports)}: hf, one process {times['hf, one process']:.1f} s", flush=True)
    each = []
    for export in exports[: options.lm_eval or None]:
        model = ["--model_args", f"pretrained={export},dtype=float32"]
        each.append(run([*theirs, *model, "--output_path", str(folder / "out")], folder))
    # Each process does the same work, so some of them tell what all would take.
    times["lm_eval for each"] = sum(each) / len(each) * len(exports)
    record["lm_eval_processes"] = len(each)
    record["lm_eval"] = summary(each)
    print(
        f"sweep of {len(exports)}: lm_eval for each {times['lm_eval for each']:.1f} s"
        f" (from {len(each)} processes)",
        flush=True,
    )
    record["seconds"] = times
    record["ratio"] = {
        name: times[name] / times["castalia eval"] for name in times if name != "castalia eval"
    }
    for name, value in record["ratio"].items():
        print(f"  {name} / castalia eval: {value:.2f}")
    return record


def sweep_in_one_process(options: argparse.Namespace) -> None:
    """`hf` on all checkpoints, with tasks that are loaded once."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    loaded = hf_tasks(Path(options.folder), SWEPT)
    for export in options.one_process:
        model = hf_model(Path(export), options.batch)
        with silent():
            harness_evaluate(model, loaded, log_samples=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests")
    parser.add_argument("--parts", default="parity,throughput,server,sweep")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of tasks, without the sweep")
    parser.add_argument("--shape", choices=SHAPES, default="70m")
    parser.add_argument("--sweep-shape", choices=SHAPES, default="14m")
    parser.add_argument("--documents", type=int, default=200, help="of the largest tasks")
    parser.add_argument("--sweep-documents", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, default=27)
    parser.add_argument(
        "--lm-eval", type=int, default=0, help="processes of lm_eval in the sweep; 0 is all"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8767)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=str(RESULTS / "eval.json"))
    parser.add_argument("--one-process", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shape = options.sweep_shape = "tiny"
        options.documents = options.sweep_documents = 16
        options.checkpoints = options.rounds = 2
    return options


def main() -> None:
    """Measure, print, write JSON."""
    options = parse()
    torch.set_num_threads(options.threads)
    # The harness's bootstrap draws the same numbers without its pool of processes.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.one_process:
        sweep_in_one_process(options)
        return
    from castalia.eval import open_tasks
    from castalia.inference import load

    parts = options.parts.split(",")
    text, tokenizer = read_tokenizer()
    if options.quick:
        from castalia.tokenizers.tokenizer import load_tokenizer

        text = load_tokenizer("bytes").text
        tokenizer = "bytes"
    chosen = {key: value for key, value in vars(options).items() if value is not None}
    del chosen["output"]
    record: dict[str, Any] = {"machine": describe(), "options": chosen, "tokenizer": tokenizer}
    record["instructions"] = instructions()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if {"parity", "throughput", "server"} & set(parts):
            names = write_tasks(folder / "tasks", options.documents, options.kinds.split(","))
            (export,) = write_run(folder / "run", SHAPES[options.shape], [1], text)
            tasks = open_tasks(names, include=[str(folder / "tasks")])
            ours = load(folder / "run", engine="torch", device="cpu")
            theirs = hf_model(export, options.batch)
        if "parity" in parts:
            loaded = hf_tasks(folder / "tasks", names)
            record["parity"] = measure_parity(ours, theirs, tasks, loaded, options.batch)
            show_parity(record["parity"])
        if "throughput" in parts:
            record["throughput"] = measure_throughput(ours, theirs, tasks, options)
            reached(record["throughput"]["all"]["ratio"]["median"], "throughput")
        if "server" in parts:
            record["server"] = measure_server(folder / "run", theirs, tasks, options)
            reached(record["server"]["all"]["ratio"]["median"], "server")
        if "sweep" in parts:
            write_tasks(folder / "swept", options.sweep_documents, SWEPT)
            steps = list(range(1, options.checkpoints + 1))
            exports = write_run(folder / "suite", SHAPES[options.sweep_shape], steps, text)
            record["sweep"] = measure_sweep(folder / "suite", exports, folder / "swept", options)
            for name, value in record["sweep"]["ratio"].items():
                print(f"against {name}:", end=" ")
                reached(value, "sweep")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


def reached(value: float, goal: str) -> None:
    """One line a goal."""
    state = "reached" if value >= GOALS[goal] else "NOT reached"
    print(f"goal: {goal} {value:.2f}, wanted {GOALS[goal]:g}: {state}")


if __name__ == "__main__":
    main()
