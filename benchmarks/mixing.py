"""Do learned mixtures train better than fixed ones? Every mixer on the same text, model and seeds.

    python benchmarks/mixing.py [--full | --small | --quick] [--work FOLDER] [--jobs N]
                                [--seeds 1,2,3] [--json FILE] [--table]

Each finished run is one file in the work folder. The same command resumes an interrupted
benchmark, with N processes of one thread. It ends with a table, a JSON file and a picture; --report
makes these from the finished runs alone, and --table prints that of a results file.

Fixed in advance: corpus and scale; five seeds; S = 1 - t*/T as in mixing_numbers.saved, against
the best of natural, uniform and UniMax on the same metric, and against natural, the baseline
nearest to those of papers. No setting of an arm was chosen on these seeds or on this held-out text.
`again` is uniform with another order of the rows: its S is that of two equal arms, the noise of all
other numbers. `confirm` repeats an arm without the steps that it saved, on a complete schedule of
its own.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from machine import describe
from mixing_corpus import DIAGNOSTIC, corpus
from mixing_numbers import (
    Result,
    against,
    best_arm,
    curve,
    final,
    metrics,
    noise_floor,
    perplexity_curve,
    saved_by_seed,
    saved_of_means,
)
from mixing_picture import draw
from mixing_run import Job, Scale, read_text, train

from castalia.core.files import write_json
from castalia.core.memory import keep_freed_memory

HERE = Path(__file__).resolve().parent
OUTSIDE = ("perl", "docstrings")
"""Sources that no arm trains on."""
FIXED = ("natural", "uniform", "unimax")
"""The fixed mixtures that a learned one has to beat."""
SCALES = {
    "quick": Scale(steps=40, rows=8, width=32, eval_rows=4, feed_rows=2),
    "small": Scale(),
    "default": Scale(steps=800, rows=32, width=96),
    "full": Scale(steps=2000, rows=32, layers=4, width=128, lr=4e-3),
}
"""On two idle cores: seconds, about 15 minutes, about 45 minutes, and a night."""
UNIMAX_EPOCHS = {"quick": 1, "small": 1, "default": 4, "full": 4}
"""Maximum passes over a source. Runs of the smaller scales are too short for four to bind, and
UniMax would be uniform."""
TILT = 4.0
"""Temperature of the prior of `progress-tilt`, and of the fixed mixture with the same shares."""


def main() -> None:
    """Do the missing runs, then report."""
    options = read_options()
    if options.table:
        print_table(json.loads(options.json.read_text()))
        return
    bench = Bench(options)
    if not options.report:
        for stage in (bench.first, bench.second, bench.third):
            bench.run(list(stage()))
    bench.report()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="a larger model, longer runs",
    )
    parser.add_argument(
        "--small",
        dest="size",
        action="store_const",
        const="small",
        help="a smaller model, shorter runs",
    )
    parser.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="a smoke test",
    )
    parser.add_argument(
        "--schedule", default="cosine", choices=("cosine", "wsd", "constant"), help="learning rate"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/mixing-benchmark"),
        help="folder of the finished runs",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[1, 2, 3, 4, 5]
    )
    parser.add_argument(
        "--arms", type=lambda text: text.split(","), help="only these arms, and the fixed mixtures"
    )
    parser.add_argument("--report", action="store_true", help="only report finished runs")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the results file"
    )
    parser.add_argument("--json", type=Path, help="output file; the picture is written beside it")
    options = parser.parse_args()
    options.size = options.size or "default"
    name = "mixing"
    if options.size != "default":
        name += f"-{options.size}"
    if options.schedule != "cosine":
        name += f"-{options.schedule}"
    options.json = options.json or HERE / "results" / f"{name}.json"
    return options


class Bench:
    """The runs of one scale on one corpus, as files in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.scale = replace(SCALES[options.size], schedule=options.schedule)
        paths = corpus(options.work / "corpus")
        inside = [source for source in paths.sources if source not in OUTSIDE]
        self.text = read_text(paths, inside, self.scale)
        self.outside = read_text(
            paths, [source for source in OUTSIDE if source in paths.sources], self.scale
        )
        self.about = paths.facts["sources"]
        rows = np.concatenate([*self.text.train, *self.text.measured, *self.outside.measured])
        self.content = hashlib.sha256(rows.tobytes()).hexdigest()
        key = json.dumps([asdict(self.scale), self.content], sort_keys=True)
        self.folder = options.work / hashlib.sha256(key.encode()).hexdigest()[:12]

    @property
    def natural(self) -> np.ndarray:
        """(K,) shares by training rows."""
        sizes = np.array(self.text.sizes, np.float64)
        return sizes / sizes.sum()

    def first(self) -> Iterator[Job]:
        """The arms that need no other run, seed by seed."""
        for seed in self.options.seeds:
            for arm, (kind, options) in self.arms().items():
                yield Job(arm, seed, kind, options)
            yield Job("again", seed, "uniform", order=seed + 1000)

    def arms(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Mixer and settings of each arm; the warm-up is 5% of a run."""
        sizes = self.text.sizes
        warm = {"warmup_steps": self.scale.steps // 20}
        rows = float(self.scale.steps * self.scale.rows)
        tilt = self.natural ** (1 / TILT)
        return {
            "natural": ("natural", {"sizes": sizes}),
            "uniform": ("uniform", {}),
            "unimax": (
                "unimax",
                {"sizes": sizes, "budget": rows, "max_epochs": UNIMAX_EPOCHS[self.options.size]},
            ),
            "temperature": ("temperature", {"sizes": sizes, "temperature": TILT}),
            "odm-repo": ("odm-repo", warm),
            "odm-paper": ("odm-paper", warm),
            "odm": ("odm", warm),
            "ado": (
                "ado",
                {"prior": self.natural.tolist(), "refit_every": max(30, self.scale.steps // 20)},
            ),
            "progress": ("progress", warm),
            "progress-tilt": ("progress", warm | {"prior": (tilt / tilt.sum()).tolist()}),
        }

    def second(self) -> Iterator[Job]:
        """The arms that use results of other seeds: mean shares as a fixed mixture, and targets."""
        for place, seed in enumerate(self.options.seeds):
            others = [s for s in self.options.seeds if s != seed] or [seed]
            for arm in ("odm", "progress", "progress-tilt"):
                if all(self.done(arm, s) for s in others):
                    shares = np.mean([self.read(arm, s)["mean_share"] for s in others], axis=0)
                    yield Job(
                        f"{arm}-mean", seed, "static", {"prior": (shares / shares.sum()).tolist()}
                    )
            other = others[place % len(others)]
            if self.done("uniform", other):
                # Losses on the very rows that the mixer learns from.
                target = self.read("uniform", other)["fed"]
                yield Job(
                    "dbl", seed, "dbl", {"target": target}, feed=max(1, self.scale.steps // 20)
                )

    def third(self) -> Iterator[Job]:
        """Confirmation runs of Castalia's own mixers, if they save any steps."""
        results = self.results()
        for arm in ("progress", "progress-tilt"):
            if not results.get(arm):
                continue
            saving = self.compare(results, arm, "M1")["saved"]
            if saving <= 0:
                continue
            for seed in self.options.seeds:
                kind, options = self.arms()[arm]
                yield Job(f"{arm}-confirm", seed, kind, options, share=round(1 - saving, 3))

    def path(self, arm: str, seed: int) -> Path:
        """The file of a run."""
        return self.folder / f"{arm}.{seed}.json"

    def done(self, arm: str, seed: int) -> bool:
        """Whether a run is finished."""
        return self.path(arm, seed).is_file()

    def finished(self, job: Job) -> bool:
        """Whether this very run is finished.

        With more seeds, an arm that uses results of other seeds changes.
        """
        if not self.done(job.arm, job.seed):
            return False
        result = self.read(job.arm, job.seed)
        # Through JSON, as in the file: tuples become lists.
        wanted = json.loads(json.dumps(asdict(job)))
        return result["job"] == wanted and ("fed" in result or job.arm != "uniform")

    def read(self, arm: str, seed: int) -> Result:
        """A finished run."""
        result: Result = json.loads(self.path(arm, seed).read_text())
        return result

    def results(self) -> dict[str, dict[int, Result]]:
        """All finished runs by arm and seed."""
        results: dict[str, dict[int, Result]] = {}
        for path in sorted(self.folder.glob("*.json")):
            arm, seed = path.stem.rsplit(".", 1)
            if int(seed) in self.options.seeds:
                results.setdefault(arm, {})[int(seed)] = self.read(arm, int(seed))
        return results

    def run(self, jobs: list[Job]) -> None:
        """Do the unfinished runs in several processes, which share the text by forking."""
        chosen = self.options.arms
        wanted = [job for job in jobs if not chosen or job.arm in chosen or job.arm in FIXED]
        missing = [job for job in wanted if not self.finished(job)]
        self.folder.mkdir(parents=True, exist_ok=True)
        print(
            f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished in {self.folder}",
            flush=True,
        )
        if not missing:
            return
        with multiprocessing.get_context("fork").Pool(self.options.jobs, alone, (self,)) as pool:
            for place, name in enumerate(pool.imap_unordered(run_one, missing), 1):
                print(f"  {place}/{len(missing)} {name}", flush=True)

    def weights(self, metric: str) -> np.ndarray:
        """(K,) weights of the sources in M1 or M2."""
        if metric == "M2":
            return self.natural
        return np.full(len(self.text.sources), 1 / len(self.text.sources))

    def base(self, results: dict[str, dict[int, Result]], metric: str) -> str:
        """The best fixed mixture on a metric."""
        weights = self.weights(metric)
        return best_arm(
            results,
            [arm for arm in FIXED if arm in results],
            lambda result: float(final(result) @ weights),
        )

    def compare(
        self, results: dict[str, dict[int, Result]], arm: str, metric: str
    ) -> dict[str, Any]:
        """An arm against the best fixed mixture."""
        base = self.base(results, metric)
        return {"base": base} | against(results[arm], results[base], self.weights(metric))

    def against_natural(
        self, results: dict[str, dict[int, Result]], arm: str
    ) -> dict[str, dict[str, Any]]:
        """Steps saved against the corpus's own proportions, on M1 and on the papers' M1'."""
        if "natural" not in results:
            return {}

        def mean_curve(result: Result) -> Any:
            return curve(result, self.weights("M1"))

        curves = {"M1": mean_curve, "M1 ppl": perplexity_curve}
        return {
            metric: saved_by_seed(results[arm], results["natural"], curve_of)
            for metric, curve_of in curves.items()
        }

    def report(self) -> None:
        """Write the table, the JSON file and the picture of the finished runs."""
        results = self.results()
        everything = [final(result) for runs in results.values() for result in runs.values()]
        best = np.min(everything, axis=0)
        rows = {arm: self.row(results, arm, best) for arm in results}
        value = {
            "machine": describe(),
            "scale": asdict(self.scale),
            "seeds": self.options.seeds,
            "content": self.content,
            "sources": self.sources(),
            "outside": list(self.outside.sources),
            "best_fixed": {metric: self.base(results, metric) for metric in ("M1", "M2")},
            "noise": {
                metric: {
                    arm: noise_floor(results[arm], self.weights(metric))
                    for arm in ("uniform", "progress")
                    if len(results.get(arm, {})) > 1
                }
                for metric in ("M1", "M2")
            },
            "confirm": self.confirm(results),
            "arms": rows,
        }
        write_json(self.options.json, value)
        draw(value, self.options.json.with_suffix(".svg"))
        print_table(value)

    def sources(self) -> dict[str, Any]:
        """Description and size of the sources."""
        return {
            source: {
                "about": self.about[source]["about"],
                "rows": rows,
                "zlib_bits_per_byte": round(self.about[source]["valid"]["zlib_bits_per_byte"], 2),
                "diagnostic": source in DIAGNOSTIC,
            }
            for source, rows in zip(self.text.sources, self.text.sizes, strict=True)
        }

    def row(
        self, results: dict[str, dict[int, Result]], arm: str, best: np.ndarray
    ) -> dict[str, Any]:
        """All numbers of an arm."""
        runs = results[arm]
        by_seed_metrics = {
            seed: metrics(result, self.natural, best) for seed, result in runs.items()
        }
        names = list(next(iter(by_seed_metrics.values())))
        any_run = next(iter(runs.values()))
        return {
            "kind": any_run["job"]["kind"],
            "steps": any_run["steps"],
            "seeds": sorted(runs),
            "metrics": {
                name: float(np.mean([values[name] for values in by_seed_metrics.values()]))
                for name in names
            },
            "by_seed": {
                name: {seed: values[name] for seed, values in by_seed_metrics.items()}
                for name in names
            },
            "against_best_fixed": {
                metric: self.compare(results, arm, metric) for metric in ("M1", "M2")
            },
            "against_natural": self.against_natural(results, arm),
            "losses": np.mean([final(result) for result in runs.values()], axis=0)
            .round(4)
            .tolist(),
            "mean_share": np.mean([result["mean_share"] for result in runs.values()], axis=0)
            .round(4)
            .tolist(),
            "epochs": np.mean([result["epochs"] for result in runs.values()], axis=0)
            .round(2)
            .tolist(),
            "shares": np.mean([result["shares"] for result in runs.values()], axis=0)
            .round(4)
            .tolist(),
            "curves": {
                metric: np.round(
                    np.mean([curve(r, self.weights(metric)) for r in runs.values()], axis=0), 4
                ).tolist()
                for metric in ("M1", "M2")
            }
            | {
                "M1 ppl": np.round(
                    np.mean([perplexity_curve(r) for r in runs.values()], axis=0), 4
                ).tolist()
            },
        }

    def confirm(self, results: dict[str, dict[int, Result]]) -> dict[str, Any]:
        """Distance to the base of confirmation runs: fewer steps on a complete schedule."""
        out = {}
        for arm in [name for name in results if name.endswith("-confirm")]:
            base = results[self.base(results, "M1")]
            seeds = sorted(results[arm].keys() & base.keys())
            gap = [float(final(results[arm][s]).mean() - final(base[s]).mean()) for s in seeds]
            steps = results[arm][seeds[0]]["steps"]
            out[arm] = {"steps": steps, "saved": 1 - steps / self.scale.steps, "M1_above_base": gap}
        return out


WORKER: list[Bench] = []
"""The benchmark of this worker process; inherited by forking, so that memory holds one text."""


def alone(bench: Bench) -> None:
    """Set up a worker: one thread, freed memory kept, low priority."""
    WORKER[:] = [bench]
    keep_freed_memory()
    torch.set_num_threads(1)
    os.nice(5)


def run_one(job: Job) -> str:
    """Train one arm and write its file atomically."""
    bench = WORKER[0]
    write_json(bench.path(job.arm, job.seed), train(job, bench.text, bench.outside, bench.scale))
    return job.name


def print_table(value: dict[str, Any]) -> None:
    """The arms from best to worst on M1."""
    fixed = value["best_fixed"]
    natural = value["arms"].get("natural")
    print(
        f"\n{len(value['sources'])} sources, {value['scale']['steps']} steps,"
        f" seeds {value['seeds']}; nats a byte; S, the share of steps saved, with a 95% interval:\n"
        "the median of the seeds; of the mean curves where the file has nothing by seed"
    )
    losses = ("M1", "M1 ppl", "M2", "M3", "M4")
    titles = [f"S on {metric} against {fixed[metric]}" for metric in ("M1", "M2")]
    titles += [f"S on {metric} against natural" for metric in ("M1", "M1 ppl")]
    print(f"{'arm':<22}seeds" + "".join(f"{name:>8}" for name in losses), end="")
    print("".join(f"{title:>31}" for title in titles))
    for arm, row in sorted(value["arms"].items(), key=lambda item: item[1]["metrics"]["M1"]):
        gains = [row["against_best_fixed"][metric] for metric in ("M1", "M2")]
        for metric in ("M1", "M1 ppl"):
            gain = row.get("against_natural", {}).get(metric)
            # Files of older benchmarks have mean curves alone.
            if gain is None and natural is not None:
                gain = saved_of_means(row, natural, metric)
            gains.append(gain)
        numbers = "".join(f"{row['metrics'][name]:>8.3f}" for name in losses)
        savings = "".join(f"{interval(gain):>31}" for gain in gains)
        print(f"{arm:<22}{len(row['seeds']):>5}{numbers}{savings}")
    for metric, arms in value["noise"].items():
        for arm, noise in arms.items():
            spread = f"between {noise['low']:+.1%} and {noise['high']:+.1%} in 9 of 10 pairs"
            print(f"two seeds of {arm}: S on {metric} {spread}")
    for arm, run in value["confirm"].items():
        gaps = ", ".join(f"{gap:+.4f}" for gap in run["M1_above_base"])
        print(
            f"{arm}: {run['steps']} steps ({run['saved']:.0%} less) end {gaps} nats from"
            f" {fixed['M1']} on M1"
        )


def interval(gain: dict[str, float] | None) -> str:
    """Steps saved as text; a dash where the file has no curve."""
    if not gain:
        return "-"
    return f"{gain['saved']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})"


if __name__ == "__main__":
    sys.exit(main())
