"""Loss of the demo's model after some steps with each optimizer, at the best of a few rates.

    python benchmarks/optimizers.py [--preset demo|debug] [--steps 300] [--trial-steps 100]
                                    [--kinds adamw,muon] [--batch 8] [--data PREFIX]
                                    [--json FILE]

Each optimizer first trains `--trial-steps` steps at three rates around its usual one, then all
`--steps` at the best of them; with `--trial-steps 0` at the usual one. All read the same rows and
begin with the same weights; the schedule is cosine with its floor at a tenth of the rate, and
constant with warmup for schedule-free.
The loss is that of held-out rows after the last step, in nats a token. Milliseconds are those of
the update alone, the median over the steps, without the passes and without the clip; the state is
counted from the live tensors and divided by the parameters.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from castalia.core.errors import TrainingError
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_corpus
from castalia.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
USUAL = {
    "adamw": 2e-3,
    "adam": 2e-3,
    "adamw8bit": 2e-3,
    "sgd": 0.5,
    "lion": 3e-4,
    "sm3": 0.1,
    "madgrad": 3e-3,
    "adafactor": 3e-2,
    "muon": 3e-3,
    "soap": 3e-3,
    "schedule_free": 3e-3,
}
"""A rate to begin with; a third of it and three times it are tried too."""
VALID_BATCHES = 20


def main() -> None:
    """Sweep, run, print a line for each optimizer, write JSON."""
    options = read_options()
    machine = describe()
    print(json.dumps(machine), flush=True)
    results = []
    print(f"{'optimizer':<14}{'lr':>9}{'bytes':>8}{'ms':>9}{'loss':>8}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.rows = rows_of(options, folder)
        for kind in options.kinds:
            results.append(measured(kind, Path(folder), options))
            line = results[-1]
            print(
                f"{kind:<14}{line['lr']:>9.2g}{line['state_bytes']:>8.2f}{line['ms']:>9.2f}"
                f"{line['loss']:>8.4f}",
                flush=True,
            )
    about = {"preset": options.preset, "steps": options.steps, "trial_steps": options.trial_steps}
    about |= {"batch": options.batch}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, **about, "optimizers": results}, indent=1)
    options.json.write_text(text + "\n")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="demo", choices=("demo", "debug"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trial-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=list(USUAL), help="by optim.kind"
    )
    parser.add_argument("--data", help="prefix of token files, in place of the preset's corpus")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "optimizers.json")
    return parser.parse_args()


def rows_of(options: argparse.Namespace, folder: str) -> list[str]:
    """Overrides that name the training and held-out rows; the preset's corpus is built once."""
    words = [options.preset, f"output={folder}/corpus"]
    if options.data:
        return [f"data.train={options.data}", f"data.valid={options.data}", "data.corpus=null"]
    data = ensure_corpus(load_config(words), lambda text: None).data
    return [f"data.train={list(data.train)}", f"data.valid={list(data.valid)}", "data.corpus=null"]


def measured(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The best of three rates in short runs, and the long run at it."""
    trials = {}
    # Without trials at the usual rate.
    for factor in (1 / 3, 1.0, 3.0) if options.trial_steps else ():
        lr = float(f"{USUAL[kind] * factor:.2g}")
        trials[lr] = run(kind, lr, options.trial_steps, folder, options)["loss"]
    best = min(trials, key=lambda lr: trials[lr], default=USUAL[kind])
    long = run(kind, best, options.steps, folder, options)
    return {"kind": kind, "lr": best, **long, "trials": [[lr, trials[lr]] for lr in trials]}


def run(
    kind: str, lr: float, steps: int, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One run without checkpoints: the loss of held-out rows, state and time of an update."""
    trainer = Trainer(config_of(kind, lr, steps, folder, options))
    seconds: list[float] = []
    step = trainer.updater.step

    def timed(rate: float) -> None:
        began = time.perf_counter()
        step(rate)
        seconds.append(time.perf_counter() - began)

    trainer.updater.step = timed  # type: ignore[method-assign]
    try:
        trainer.fit()
        totals = trainer.evaluate(trainer.rows.valid, VALID_BATCHES)
        loss = math.nan if totals is None else totals.loss
    except TrainingError:
        # The guard ends a run whose loss is no number.
        loss = math.inf
    tensors = trainer.updater.tensors() | trainer.updater.averages()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return {
        "loss": loss,
        "state_bytes": sum(tensor.nbytes for tensor in tensors.values()) / parameters,
        "ms": 1e3 * statistics.median(seconds),
    }


def config_of(kind: str, lr: float, steps: int, folder: Path, options: argparse.Namespace) -> Any:
    """The preset with another optimizer and rate."""
    words = [f"optim.kind={kind}", f"optim.lr={lr}", f"train.steps={steps}"]
    words += [f"train.batch_size={options.batch}"]
    words += [f"output={folder / f'{kind}-{lr}-{steps}'}", "schedule.warmup=0.1"]
    words += [f"schedule.min_lr={0.1 * lr}", "schedule.name=cosine"]
    # Held-out rows exist where a run validates; without its hooks this one does not.
    words += [f"train.eval_every={steps}", f"train.eval_batches={VALID_BATCHES}"]
    if kind == "schedule_free":
        words += ["schedule.name=constant"]
    return load_config(
        [options.preset, "mixing.kind=static", "mixing.planned=true", *options.rows, *words]
    )


if __name__ == "__main__":
    main()
