"""Evaluates the weights of a run between two of its steps."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from castalia.checkpoint import SavePolicy
from castalia.core.errors import CastaliaError
from castalia.distributed import Watchdog, World, is_loss
from castalia.eval.aside import Peers, in_words, undisturbed, whole_model
from castalia.eval.attempts import Attempts
from castalia.eval.harness_json import merged, write_neox_file
from castalia.eval.labels import labels_of
from castalia.eval.places import Checkpoint
from castalia.eval.shares import Share
from castalia.eval.work import Measured, Work
from castalia.inference import LanguageModel
from castalia.results.schema import EVALS, Labels
from castalia.results.store import ResultsStore
from castalia.runs.config import RunConfig
from castalia.train.evaluated import (
    Outcome,
    evaluation_line,
    held_out_work,
    labels_at,
    reader_of,
    samples_of,
    write_samples,
)
from castalia.train.events import append_event, warn
from castalia.train.precision import DTYPES
from castalia.train.resume import LONG
from castalia.train.stopping import say
from castalia.train.validation_rows import ValidationRows

T = TypeVar("T")
BEGUN = "evaluation-begun.json"
"""File in a run's folder, while an evaluation has not ended."""


@dataclass
class RunEvaluation:
    """The evaluations of a run in training; the fields are services of the hooks, see `Hook`.

    Raises  ConfigError for text without a tokenizer, a prompt that the model cannot continue, or
            held-out text that the data do not name.
    """

    config: RunConfig
    world: World
    weights: Callable[[], Mapping[str, Tensor]]
    """The weights of this rank, without copies of another pipeline stage's."""
    policy: SavePolicy
    watchdog: Watchdog
    is_asked: Callable[[], bool]
    stop_if_asked: Callable[[], bool]
    work: list[Work]
    """The tasks; held-out text is added here."""
    validations: ValidationRows | None
    """On the rank that writes, where the run keeps them."""
    seconds: float = 0.0
    count: int = 0
    reader: LanguageModel = field(init=False)
    labels: Labels = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.output)
        self.store = ResultsStore(self.folder / EVALS)
        section = self.config.eval.model_dump(mode="json")
        self.attempts = Attempts(self.folder / BEGUN, section)
        self.reader = reader_of(self.config)
        self.labels = labels_of(self.config.output, self.reader)
        labels = self.labels
        self.place = Checkpoint(self.config.output, labels.suite, labels.model, None, None, ())
        self.work = [*self.work, *held_out_work(self.config, self.place)]

    def labels_at(self, step: int) -> Labels:
        """What the rows of a step have in common."""
        return labels_at(self.labels, self.config, step, saved=self.policy.due(step))

    def evaluate(self, step: int, metrics: dict[str, Any]) -> bool:
        """Evaluate the weights as they are, and add the numbers to `metrics`.

        False if a request to stop broke it off; then nothing of it is kept.
        """
        if self.is_left_out(step):
            return True
        began = time.perf_counter()
        self.count += 1
        with undisturbed(self.world.device), self.watchdog.doing("evaluation", LONG):
            if self.world.leads:
                self.attempts.begin(step)
            outcome = self.outcome_at(step)
            if self.world.leads:
                self.attempts.end(step)
            if outcome.is_broken_off:
                return False
            if self.world.leads:
                self.write(step, outcome)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        metrics |= outcome.metrics
        metrics["eval_seconds"] = round(seconds, 4)
        if self.world.leads:
            self.report(step, outcome, seconds)
        return True

    def is_left_out(self, step: int) -> bool:
        """Whether the evaluation of a step is not tried again, which is said."""
        # Rank 0 decides: the others may not see its files.
        over = self.world.leads and self.attempts.are_over(step)
        if not self.world.largest(over)[0]:
            return False
        if self.world.leads:
            fault = (
                "it ended the run each time, most likely for lack of memory; a smaller eval.batch"
                f" needs less, and castalia eval {self.config.output}/step{step} measures a saved"
                " step later"
            )
            self.note(step, fault, "is left out")
        return True

    def outcome_at(self, step: int) -> Outcome:
        """Everything that the config asks for, as far as it does not fail."""
        outcome = Outcome()
        if self.stop_if_asked():
            outcome.is_broken_off = True
            return outcome
        peers = Peers(
            self.world, self.is_asked, self.watchdog.progressed, f"evaluation/{self.count}"
        )
        self.fill(outcome, peers, step)
        if self.world.device.type == "cuda":
            # The blocks of these shapes would stay reserved beside those of the training.
            torch.cuda.empty_cache()
        if peers.is_broken_off:
            outcome.is_broken_off = self.stop_if_asked()
        return outcome

    def fill(self, outcome: Outcome, peers: Peers, step: int) -> None:
        """Everything that the config asks for, one part after the other."""
        model = self.attempt("weights", peers, outcome, lambda: self.live_model(peers, step))
        if model is None:
            return
        self.run_tasks(model, peers, outcome, step)

        def samples() -> list[dict[str, Any]]:
            # One rank writes, so one rank generates.
            return samples_of(self.config, model, step) if self.world.leads else []

        if self.config.eval.samples:
            outcome.samples = self.attempt("samples", peers, outcome, samples) or []

    def attempt(self, what: str, peers: Peers, outcome: Outcome, work: Callable[[], T]) -> T | None:
        """The result of a part of an evaluation; None where it fails on any rank, which is noted.

        Raises  what the loss of a rank raises.
        """
        if peers.is_broken_off:
            return None
        try:
            with peers.together():
                return work()
        # Whatever it is, it is not worth a run of days: also out of memory, or a bug in a task.
        except Exception as error:
            if is_loss(error):
                raise
            outcome.faults.append(f"{what}: {in_words(error)}")
        return None

    def live_model(self, peers: Peers, step: int) -> LanguageModel:
        """The weights as they are, whole on this rank."""
        section = self.config.eval
        config = self.config.model.without_start()
        dtype = DTYPES[section.dtype]
        weights = self.weights()
        whole = whole_model(weights, config, self.world, peers, dtype, self.config.adapter)
        return LanguageModel(whole, self.reader.tokenizer, step, self.reader.special)

    def run_tasks(self, model: LanguageModel, peers: Peers, outcome: Outcome, step: int) -> None:
        """Evaluate each task by itself: one that fails takes no other with it."""
        share = Share(self.world.rank, self.world.size, peers.gather)
        labels = self.labels_at(step)._replace(dtype=self.config.eval.dtype)
        for task in self.work:

            def measure(task: Work = task) -> Measured:
                return task.measure(model, self.place, labels, share, outcome.rows)

            measured = self.attempt(f"task {task.name}", peers, outcome, measure)
            if measured is not None:
                outcome.rows += measured.results
                outcome.json += [measured.json] if measured.json else []

    def write(self, step: int, outcome: Outcome) -> None:
        """Write rows, samples and the file of GPT-NeoX; what cannot be written is noted."""
        try:
            if outcome.rows:
                self.store.add(outcome.rows)
            if outcome.samples:
                write_samples(self.folder, step, outcome.samples)
            if self.config.eval.results_prefix and outcome.json:
                document = reduce(merged, outcome.json)
                write_neox_file(self.config.eval.results_prefix, document)
        # As in `attempt`: what a task put into its results is not worth the run.
        except Exception as error:
            outcome.faults.append(f"writing: {in_words(error)}")

    def report(self, step: int, outcome: Outcome, seconds: float) -> None:
        """One line on the screen, and each fault in events.jsonl, too."""
        say(evaluation_line(f"{step}/{self.config.train.steps}", outcome, seconds))
        for fault in outcome.faults:
            self.note(step, fault)

    def note(self, step: int, fault: str, what: str = "failed in part") -> None:
        """Say and record what failed; the training goes on."""
        warn(f"the evaluation of step {step} {what}: {fault}; training goes on")
        event = {"step": step, "event": "evaluation", "action": "warn", "error": fault}
        # What cannot be recorded was said.
        with suppress(CastaliaError):
            append_event(self.folder, event)

    def take_validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the numbers of the validation of a step, if `metrics` has one."""
        if self.validations:
            self.validations.take(self.labels_at(step), metrics)

    def flush(self, step: int) -> None:
        """Write the rows of validations that wait."""
        if self.validations is None:
            return
        try:
            self.validations.flush(self.store)
        except (CastaliaError, OSError) as error:
            self.note(step, in_words(error))
            # Once: a table that is damaged stays so.
            self.validations = None
