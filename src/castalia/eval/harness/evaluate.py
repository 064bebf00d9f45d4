"""`evaluate`: the numbers of one checkpoint on a set of tasks."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from castalia.core.errors import ConfigError
from castalia.eval.harness.numbers import Number, numbers_of
from castalia.eval.harness.progress import Say
from castalia.eval.harness.quiet import OTHER_SEED, SEED, harness_rules, require_harness
from castalia.eval.harness.tasks import Part, TaskSet
from castalia.eval.shares import ALONE, Share
from castalia.inference import LanguageModel
from castalia.results.schema import Labels, Result
from castalia.results.task_hash import plain

BOOTSTRAP = 100_000
"""The harness's default of resamples for the error of a metric without a formula."""


@dataclass
class Evaluation:
    """The results of one checkpoint."""

    numbers: list[Number]
    json: dict[str, Any]
    """What `lm_eval` itself would write for these tasks, without samples."""
    samples: dict[str, list[dict[str, Any]]]
    """By task, each document with its requests, answers and metrics; empty unless asked for."""
    batch: int
    finished: datetime
    """When, in UTC, without a zone."""

    def __getitem__(self, key: tuple[str, str]) -> Number:
        """The number of (task, metric), by its first filter.

        Raises  KeyError if there is none.
        """
        for number in self.numbers:
            if (number.task, number.metric) == key:
                return number
        raise KeyError(key)

    def results(self, labels: Labels) -> list[Result]:
        """The numbers as rows of the results table."""
        shared: dict[str, Any] = {
            "harness": harness_name(),
            "batch": self.batch,
            "evaluated_at": self.finished,
        }
        return [labels.result(**number._asdict(), **shared) for number in self.numbers]


def harness_name() -> str:
    """Name and version of the harness, as results record it."""
    return f"lm-eval {version('lm-eval')}"


def evaluate(
    model: LanguageModel,
    tasks: TaskSet,
    *,
    batch: int = 16,
    bootstrap: int = BOOTSTRAP,
    share: Share = ALONE,
    samples: bool = False,
    chat: bool = False,
    say: Say | None = None,
) -> Evaluation:
    """Evaluate a model of any engine on `tasks`.

    Log-likelihoods are in nats. The numbers are those of the harness's own `hf` model on the
    exported checkpoint, and do not depend on `batch` or `share` beyond rounding.
    batch      rows in a forward pass, and texts that are continued together.
    bootstrap  resamples for the error of a metric without a formula, such as perplexity; 0 computes
               no errors at all.
    share      this rank's share of the work. Every rank gets the whole Evaluation.
    samples    keep each document with its answers.
    chat       write prompts with the model's chat template, examples as turns.
    say        called with a requested name, and the number of its requests answered since the last
               call.
    Raises     ConfigError if the checkpoint has no tokenizer, or a task asks for what the model
               cannot do.
    """
    if batch < 1:
        raise ConfigError(f"batch must be >= 1, got {batch}")
    if bootstrap < 0:
        raise ConfigError(f"bootstrap must be >= 0, got {bootstrap}")
    require_harness()
    from castalia.eval.harness.model import HarnessModel  # it imports the harness

    adapter = HarnessModel(model, batch=batch, share=share, encoder=tasks.encoder(model))
    parts = []
    for part in tasks.parts:
        adapter.begin(part.name, say)
        started = time.time()
        with harness_rules():
            output = run_part(
                adapter, part, limit=tasks.limit, bootstrap=bootstrap, samples=samples, chat=chat
            )
        output["config"] = config_of(adapter, tasks, batch, bootstrap)
        output["chat_template"] = None
        if chat:
            output["chat_template"] = adapter.template.text
        output["task_hashes"] = part.hashes(tasks.prompting(output["chat_template"]))
        spent = times(part, adapter.costs, time.time() - started)
        parts.append(evaluation_of(output, tasks, spent, batch, started))
    if len(parts) == 1:
        return parts[0]
    return joined(parts)


def evaluation_of(
    output: dict[str, Any], tasks: TaskSet, spent: dict[str, float], batch: int, started: float
) -> Evaluation:
    """What the harness says about one part, with what its files have beside that."""
    finished = time.time()
    samples = output.pop("samples", {})
    # Of configs with functions, too, as the harness writes its files.
    output = json.loads(json.dumps(output, default=plain))
    output["date"] = started
    output["lm_eval_version"] = version("lm-eval")
    output["total_evaluation_time_seconds"] = str(finished - started)
    numbers = numbers_of(output, output["task_hashes"], spent, tasks.shots)
    moment = datetime.fromtimestamp(finished, UTC).replace(tzinfo=None)
    return Evaluation(numbers, output, samples, batch, moment)


def run_part(
    adapter: Any, part: Part, *, limit: float | None, bootstrap: int, samples: bool, chat: bool
) -> dict[str, Any]:
    """The harness's own evaluation of one part."""
    from lm_eval.evaluator import evaluate as harness_evaluate

    output: dict[str, Any] = harness_evaluate(
        lm=adapter,
        task_dict=part.loaded,
        limit=limit,
        bootstrap_iters=bootstrap,
        log_samples=samples,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        # `open_tasks` asked.
        confirm_run_unsafe_code=True,
    )
    return output


def config_of(adapter: Any, tasks: TaskSet, batch: int, bootstrap: int) -> dict[str, Any]:
    """What the harness's JSON says about the run, under its own names."""
    engine = adapter.model.engine
    return {
        "model": f"castalia:{engine.name}",
        "model_args": {"dtype": engine.numbers},
        "batch_size": batch,
        "device": str(engine.device),
        "limit": tasks.limit,
        "bootstrap_iters": bootstrap,
        "gen_kwargs": None,
        "random_seed": SEED,
        "numpy_seed": OTHER_SEED,
        "torch_seed": OTHER_SEED,
        "fewshot_seed": tasks.seed,
    }


def times(part: Part, costs: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Seconds of each task and group of a part.

    The harness sends the requests of all its tasks together, so a task's time is its share of the
    tokens.
    """
    total = sum(costs.values()) or 1
    shares = {name: seconds * costs.get(name, 0) / total for name in part.tasks}
    for name, group in part.loaded["groups"].items():
        shares[name] = sum(shares[task.task_name] for task in group.get_all_tasks())
    return shares


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several parts as one Evaluation."""
    output: dict[str, Any] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    seconds = 0.0
    for part in evaluations:
        seconds += float(part.json["total_evaluation_time_seconds"])
        samples |= part.samples
        for key, value in part.json.items():
            # Tables by task grow; what is the same for every part stays.
            if isinstance(value, dict) and key != "config":
                output[key] = {**output.get(key, {}), **value}
            else:
                output.setdefault(key, value)
    output["total_evaluation_time_seconds"] = str(seconds)
    numbers = [number for part in evaluations for number in part.numbers]
    last = evaluations[-1]
    return Evaluation(numbers, output, samples, last.batch, last.finished)
