"""Faulty steps: stopped, skipped, or rolled back from; and the same again after a crash."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint import read, read_state
from castalia.core.errors import ConfigError, TrainingError
from castalia.data import IndexedDatasetWriter
from castalia.distributed import World
from castalia.losses import NextToken
from castalia.recipes import load_config
from castalia.runs.config import GuardConfig
from castalia.train.events import in_words, ranges, read_events
from castalia.train.guard import Guard, Verdict
from castalia.train.hooks import Hook, Metrics, Save, StepLine, Validate
from castalia.train.totals import StepTotals
from castalia.train.trainer import Trainer

EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "rows_hash")


class Poisoned(NextToken):
    """The loss of some steps of 12 rows times a factor, `times` times each."""

    def __init__(self, steps, factor=math.nan, times=math.inf):
        super().__init__()
        self.left = dict.fromkeys(steps, times)
        self.factor = factor

    def __call__(self, scored, batch):
        out = super().__call__(scored, batch)
        step = int(batch.index[0]) // 12 + 1
        if not torch.is_grad_enabled() or self.left.get(step, 0) <= 0:
            return out
        self.left[step] -= 1
        return dataclasses.replace(out, total=out.total * self.factor)


class CrashAfter(Hook):
    """Ends the run after a step, once."""

    def __init__(self, step):
        self.step = step

    def start(self, *args):
        self.returned = False

    def rolled_back(self, step):
        self.returned = True

    def after_step(self, step):
        if step.number == self.step and self.returned:
            raise RuntimeError("crash")


@pytest.fixture
def make(tokens, train, tmp_path):
    """Callable that builds a Trainer with metrics and checkpoints, in the folder `name`."""

    def build(name, *overrides, loss=None, hooks=None) -> Trainer:
        config = load_config(
            [*train.base, "checkpoint.every=2", f"output={tmp_path / name}", *overrides]
        )
        hooks = [Metrics(), StepLine(), Save()] if hooks is None else hooks
        return Trainer(config, World(0, 1, torch.device("cpu")), hooks=hooks, loss=loss)

    return build


def guard_of(scaled: bool = False, **options) -> Guard:
    """A guard that has nothing to log and no checkpoint to name."""
    alone = World(0, 1, torch.device("cpu"))
    config = GuardConfig(**options)
    return Guard(config, world=alone, store=None, output="none", scaled=scaled)


def fit(trainer):
    trainer.fit()
    return trainer


def lines(trainer):
    text = Path(trainer.config.output, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def require_equal(ours, theirs, skipped):
    """The same weights, moments and metrics, except the numbers of skipped steps."""
    tensors = [read(trainer.store.folder_of(6), prefix="") for trainer in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    for mine, other in zip(lines(ours), lines(theirs), strict=True):
        keys = ("step", "tokens", "rows_hash") if mine["step"] in skipped else EXACT
        assert [mine[key] for key in keys] == [other[key] for key in keys]
        assert ("skipped" in mine) == (mine["step"] in skipped)


def test_a_skipped_step_consumes_its_rows_and_updates_nothing(make):
    plain = fit(make("plain"))
    ours = fit(make("ours", "guard.skip_steps=[3]"))
    assert [line["rows_hash"] for line in lines(ours)] == [
        line["rows_hash"] for line in lines(plain)
    ]
    assert [line["tokens"] for line in lines(ours)] == [line["tokens"] for line in lines(plain)]
    assert (ours.progress.step, ours.progress.updates) == (6, 5)
    third = lines(ours)[2]
    assert third["loss"] is None and third["skipped"] == "asked"
    assert lines(ours)[3]["loss"] != lines(plain)[3]["loss"]
    assert read_events(ours.config.output) == []


def test_skip_logs_the_step_with_its_rows(make, capsys):
    asked = fit(make("asked", "guard.skip_steps=[3]"))
    ours = fit(make("ours", "guard.nan=skip", loss=Poisoned([3])))
    require_equal(ours, asked, {3})
    (event,) = read_events(ours.config.output)
    assert event == {
        "step": 3, "event": "nan", "action": "skip", "loss": "nan", "grad_norm": "nan",
        "rows": list(range(24, 36)), "skips": [3],
    }  # fmt: skip
    said = "castalia: warning: loss nan at step 3 (rows 24 to 35 of the data order); skipped"
    assert said in capsys.readouterr().err
    assert read_state(ours.store.folder_of(6))["guard"]["skips"] == {"3": "nan"}


@pytest.mark.parametrize("times", [1, math.inf])
def test_rollback_is_the_run_in_which_the_step_was_never_taken(make, times, capsys):
    asked = fit(make("asked", "guard.skip_steps=[4]"))
    ours = fit(make("ours", "guard.nan=rollback", loss=Poisoned([4], times=times)))
    require_equal(ours, asked, {4})
    (event,) = read_events(ours.config.output)
    assert (event["action"], event["to"], event["skips"]) == ("rollback", 2, [4])
    assert "rolling back to step 2; skipped: step 4" in capsys.readouterr().err


def test_rollback_skips_steps_before_it_but_none_before_the_checkpoint(make):
    asked = fit(make("asked", "guard.skip_steps=[3,4]"))
    ours = fit(make("ours", "guard.nan=rollback", "guard.skip_before=3", loss=Poisoned([4])))
    require_equal(ours, asked, {3, 4})


def test_a_crash_after_the_rollback_does_not_forget_it(make, tmp_path):
    """The number was wrong once only: without the record, the second start would take step 4."""
    asked = fit(make("asked", "guard.skip_steps=[4]"))
    crashing = [Metrics(), Save(), CrashAfter(3)]
    with pytest.raises(RuntimeError, match="crash"):
        fit(make("ours", "guard.nan=rollback", loss=Poisoned([4], times=1), hooks=crashing))
    events = tmp_path / "ours" / "events.jsonl"
    with open(events, "a") as file:
        file.write('{"step": 9, "ev')  # torn by the crash
    ours = fit(make("ours", "guard.nan=rollback"))
    require_equal(ours, asked, {4})
    assert ours.guard.returns == [2]
    assert events.read_text().count("\n") == 1


def test_without_the_record_the_checkpoint_knows(make, tmp_path):
    asked = fit(make("asked", "guard.skip_steps=[4]"))
    fit(make("ours", "guard.nan=rollback", "train.steps=5", loss=Poisoned([4])))
    (tmp_path / "ours" / "events.jsonl").unlink()
    ours = fit(make("ours", "guard.nan=rollback"))
    require_equal(ours, asked, {4})
    assert (ours.guard.skips, ours.guard.returns) == ({4: "nan"}, [2])


def test_rollback_always_finds_the_start(make):
    asked = fit(make("asked", "guard.skip_steps=[1]"))
    ours = fit(make("ours", "guard.nan=rollback", "checkpoint.every=null", loss=Poisoned([1])))
    require_equal(ours, asked, {1})
    with pytest.raises(
        TrainingError,
        match=r"no checkpoint exists to roll back to; save the start with checkpoint.steps=\[0\]",
    ):
        fit(make("unsaved", "guard.nan=rollback", loss=Poisoned([1]), hooks=[]))


def test_rollback_passes_over_a_damaged_checkpoint_of_a_later_step(make):
    folder = fit(make("run")).store.folder_of(6)
    shard = folder / "model-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    ours = make("run", "guard.nan=rollback", loss=Poisoned([5]))
    with pytest.warns(UserWarning, match="skipping the checkpoint of step 6"):
        fit(ours)
    (event,) = read_events(ours.config.output)
    assert (event["to"], event["skips"]) == (4, [5])
    assert ours.progress.step == 6


def test_rollbacks_are_limited(make):
    trainer = make("run", "guard.nan=rollback", "guard.max_rollbacks=2", loss=Poisoned(range(3, 7)))
    with pytest.raises(
        TrainingError, match=r"step 5 .*already rolled back 2 times.*guard.max_rollbacks=4"
    ):
        trainer.fit()
    assert [event["step"] for event in read_events(trainer.config.output)] == [3, 4, 5]


@pytest.fixture
def no_targets(tmp_path):
    """Overrides of data by kind; of 2 rows a step, most steps have no target."""
    random = np.random.default_rng(0)
    texts = [random.integers(97, 123, 17 if place % 5 == 0 else 1) for place in range(40)]
    answers = [random.integers(97, 123, 17) for _ in range(40)]
    labels = [text if place % 5 == 0 else text * 0 - 100 for place, text in enumerate(answers)]
    # The validation's order is made of the first five rows, of which this one comes last.
    unread = [text if place == 3 else text * 0 - 100 for place, text in enumerate(answers)]
    files = {"short": texts, "answers": answers, "answers_label": labels, "unread_label": unread}
    for name, documents in files.items():
        with IndexedDatasetWriter(tmp_path / name, "int32") as writer:
            for document in documents:
                writer.add(document)
    short = f"data.train={tmp_path / 'short'}"
    return {
        "labels": [
            f"data.train={tmp_path / 'answers'}",
            f"data.labels={tmp_path / 'answers_label'}",
            "data.packing=unpacked",
            # A validation reads the first two rows of its order, and the last of five has targets.
            f"data.valid={tmp_path / 'answers'}",
            f"data.valid_labels={tmp_path / 'unread_label'}",
            "train.eval_every=6",
            "train.eval_batches=1",
        ],
        "unpacked": [short, "data.packing=unpacked"],
        "best_fit": [short, "data.packing=best_fit", "data.document_mask=documents"],
    }


@pytest.mark.parametrize("kind", ["labels", "unpacked", "best_fit"])
def test_steps_without_targets_update_nothing(make, no_targets, kind, capsys):
    """The same weights and moments as when these steps are skipped by request."""
    data = [*no_targets[kind], "train.batch_size=2", "data.tokenizer=null"]
    ours = fit(make("ours", *data, hooks=[Validate(), Metrics(), StepLine(), Save()]))
    skipped = [line["step"] for line in lines(ours) if "skipped" in line]
    assert {line.get("skipped") for line in lines(ours)} == {None, "no targets"}
    assert ours.progress.without_targets == len(skipped) == 6 - ours.progress.updates
    assert all(lines(ours)[step - 1]["loss"] is None for step in skipped)
    if kind == "labels":
        assert lines(ours)[5]["valid_loss"] is None
    assert capsys.readouterr().err.count("no targets at step") == 1
    asked = fit(make("asked", *data, f"guard.skip_steps={skipped}"))
    require_equal(ours, asked, skipped)


def test_skips_in_a_row_are_limited(make):
    trainer = make("run", "guard.nan=skip", "guard.max_skips=2", loss=Poisoned(range(2, 7)))
    with pytest.raises(
        TrainingError, match=r"step 4: 3 consecutive steps were skipped, over guard.max_skips=2"
    ):
        trainer.fit()


@pytest.mark.parametrize("policy", ["warn", "stop", "skip", "rollback"])
def test_a_spike_of_the_loss(make, policy, capsys):
    options = ("guard.spike_window=4", "guard.spike_sigma=20", f"guard.spike={policy}")
    trainer = make("run", *options, "optim.lr=1e-5", loss=Poisoned([5], factor=3.0))
    if policy == "stop":
        with pytest.raises(
            TrainingError, match=r"spike: loss \d+.*at step 5 \(rows 48 to 59.*skip_steps=\[5\]"
        ):
            trainer.fit()
        return
    trainer.fit()
    assert "spike: loss" in capsys.readouterr().err
    (event,) = read_events(trainer.config.output)
    assert (event["step"], event["event"], event["action"]) == (5, "spike", policy)
    assert trainer.progress.updates == (6 if policy == "warn" else 5)
    assert lines(trainer)[4].get("skipped") == (None if policy == "warn" else "spike")
    assert len(trainer.guard.window["loss"]) == 4


def test_the_spike_rule_is_the_formula():
    guard = guard_of(spike="warn", spike_sigma=3.0, spike_window=8, spike_of=["grad_norm"])
    values = [1.0, 1.2, 0.9, 1.1]
    for value in values[:3]:
        guard.window["grad_norm"].append(value)
    assert guard.judge(StepTotals(2.0, 1, norm=100.0)) is Verdict.GOOD  # too few to judge by
    guard.window["grad_norm"].append(values[3])
    limit = statistics.fmean(values) + 3 * statistics.stdev(values)
    assert guard.judge(StepTotals(2.0, 1, norm=limit * 0.999)) is Verdict.GOOD
    assert guard.judge(StepTotals(2.0, 1, norm=limit * 1.001)) is Verdict.SPIKE


def test_a_gradient_beyond_fp16_is_an_overflow_and_a_loss_that_is_none_is_not():
    scaled = guard_of(scaled=True)
    assert scaled.judge(StepTotals(2.0, 1, norm=math.inf)) is Verdict.OVERFLOW
    assert scaled.judge(StepTotals(math.nan, 1, norm=math.inf)) is Verdict.NAN
    assert guard_of().judge(StepTotals(2.0, 1, norm=math.inf)) is Verdict.NAN


def test_the_state_survives_json_and_merges_with_what_was_decided_since():
    before = guard_of(skip_steps=[9])
    after = guard_of()
    before.skips[3] = "nan"
    before.returns = [2, 2]
    before.in_a_row = 1
    before.window["loss"].extend([0.1, 1 / 3])
    after.skips[5] = "spike"
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.skips == {9: "asked", 3: "nan", 5: "spike"}
    assert (after.returns, after.in_a_row, list(after.window["loss"])) == ([2, 2], 1, [0.1, 1 / 3])


def test_words():
    assert ranges([1]) == "1" and ranges([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"
    assert in_words("nan", 2.0, math.inf) == "gradient norm inf"
    assert "on another rank" in in_words("nan", 2.0, 1.0)


def test_a_policy_that_is_none_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match=r"guard.nan: expected one of stop, skip, rollback"):
        load_config([*train.base, "guard.nan=ignore"])
