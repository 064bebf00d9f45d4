"""What an evaluation of a run gives: numbers, samples, files, one line."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.core.files import write_json
from castalia.data import load_tokenizer
from castalia.data.sources import source_names
from castalia.distributed import World
from castalia.eval.aside import undisturbed
from castalia.eval.config import EvalConfig
from castalia.eval.held_out import TASK, Windows
from castalia.eval.places import Checkpoint
from castalia.eval.work import HeldOutWork, Work, WorkOptions, open_work
from castalia.inference import LanguageModel
from castalia.models import Decoder
from castalia.results import Result
from castalia.results.schema import PACKAGES, Labels
from castalia.results.store import EXTRA, PURPOSE
from castalia.runs.config import RunConfig

SAMPLES = Path("samples") / "samples.json"
COLUMNS = 80
"""Width of the line of an evaluation."""


def open_tasks_of(section: EvalConfig, world: World) -> list[Work]:
    """The tasks of a run, with their data; held-out text, which the data name, is left out.

    Raises  ConfigError if an extra is missing or a task is unknown; DataError for a task without
            data.
    """
    # Found now: an evaluation after days of training would have nowhere to put its rows.
    for name in PACKAGES:
        require(name, EXTRA, PURPOSE)
    options = work_options(section)
    options = replace(options, tasks=tuple(name for name in section.tasks if name != TASK))

    def opened() -> list[Work]:
        with undisturbed(world.device):
            return open_work(options)

    # One rank first: it downloads and caches what the others then find.
    work = opened() if world.leads else None
    world.wait()
    return opened() if work is None else work


def work_options(section: EvalConfig) -> WorkOptions:
    """The section in the terms of a sweep."""
    return WorkOptions(
        tasks=tuple(section.tasks),
        include=tuple(section.include),
        shots=(section.shots,),
        limit=section.limit,
        batch=section.batch,
        bootstrap=section.bootstrap,
    )


def held_out_work(config: RunConfig, place: Checkpoint) -> list[Work]:
    """The held-out text of a run, if its tasks have it.

    Raises  ConfigError without data.valid; DataError if a token file is damaged.
    """
    if TASK not in config.eval.tasks:
        return []
    prefixes = config.data.valid or []
    if not prefixes:
        raise ConfigError(
            f"eval.tasks: {TASK} reads the token files of data.valid, and there are none; name"
            f" some, or leave {TASK} out"
        )
    options = replace(
        work_options(config.eval),
        held_out=dict(zip(source_names(prefixes), prefixes, strict=True)),
        windows=Windows(config.data.seq_length),
    )
    work = HeldOutWork(options)
    work.expected(place)
    return [work]


def reader_of(config: RunConfig) -> LanguageModel:
    """The model of a run without weights: its tokenizer, its shapes.

    Raises  ConfigError for text without a tokenizer, or a prompt that the model cannot continue.
    """
    section = config.eval
    with torch.device("meta"):
        shapes = Decoder(config.model)
    if config.data.tokenizer is None:
        if section.evaluates:
            what = "tasks" if section.tasks else "samples"
            raise ConfigError(
                f"eval.{what}: text needs a tokenizer, and data.tokenizer is null; name one, or"
                f" set eval.{what}=[]"
            )
        return LanguageModel(shapes)
    model = LanguageModel(shapes, load_tokenizer(config.data.tokenizer))
    limit = config.model.max_position_embeddings
    for prompt in section.samples:
        count = len(model.encode(prompt))
        if count >= limit:
            raise ConfigError(
                f"eval.samples: the prompt {prompt[:20]!r} has {count} tokens, but the model reads"
                f" {limit}, prompt and sample together"
            )
    return model


def labels_at(labels: Labels, config: RunConfig, step: int, *, saved: bool) -> Labels:
    """The labels of a run for the rows of one step."""
    precision = config.precision
    return labels._replace(
        seed=config.start_seed,
        step=step,
        last_step=config.train.steps,
        tokens=step * config.tokens_per_step,
        dtype=precision if precision == "fp32" else f"{precision} autocast",
        # A step that is not saved has no name.
        checkpoint=os.path.join(config.output, f"step{step}") if saved else None,
    )


@dataclass
class Outcome:
    """What came of one evaluation."""

    rows: list[Result] = field(default_factory=list)
    json: list[dict[str, Any]] = field(default_factory=list)
    """What the harness writes, of each requested task."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_broken_off: bool = False
    """Whether a request to stop ended it; nothing of it counts."""

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers as metrics of the step: eval/TASK/METRIC, with the filter where there is
        one."""
        metrics = {}
        for row in self.rows:
            name = f"eval/{row.task}/{row.metric}"
            if row.filter != "none":
                name += f",{row.filter}"
            metrics[name] = row.value
        return metrics


def samples_of(config: RunConfig, model: LanguageModel, step: int) -> list[dict[str, Any]]:
    """Continuations of the prompts: a list of {"step", "prompt", "text"}."""
    section = config.eval
    done = model.complete(
        section.samples,
        section.sample_tokens,
        temperature=section.sample_temperature,
        top_k=section.sample_top_k,
        seed=section.sample_seed,
    )
    pairs = zip(section.samples, done, strict=True)
    return [{"step": step, "prompt": prompt, "text": each.text} for prompt, each in pairs]


def write_samples(folder: Path, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Add the samples of a step; those that the file has of it or of later steps are dropped, since
    these steps run again."""
    path = folder / SAMPLES
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [sample for sample in before if sample["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [*kept, *samples])


def evaluation_line(where: str, outcome: Outcome, seconds: float) -> str:
    """One line: the first number of each task, as many as fit."""
    words = [f"eval {where}", f"{seconds:.1f} s"]
    texts: dict[str, str] = {}
    for row in outcome.rows:
        # `bits_per_byte/SOURCE` names its metric already.
        metric = "" if row.task.startswith(row.metric) else f" {row.metric}"
        texts.setdefault(row.task, f"{row.task}{metric} {row.value:.4g}")
    rest = list(texts.values())
    if outcome.samples:
        rest.append(f"samples {len(outcome.samples)}")
    while rest and len("  ".join([*words, rest[0]])) <= COLUMNS:
        words.append(rest.pop(0))
    if rest:
        words.append(f"and {len(rest)} more")
    return "  ".join(words)
