"""Evaluation while a run trains: what it writes, and that the run does not notice it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fixtures.harness_tasks import METRIC, TASKS, write_task

import castalia
import castalia.train.evaluation as evaluation
from castalia.checkpoint import read
from castalia.core.errors import CastaliaError
from castalia.data import IndexedDatasetWriter
from castalia.eval.aside import Peers
from castalia.eval.attempts import Attempts
from castalia.eval.labels import labels_of
from castalia.eval.places import Checkpoint
from castalia.eval.work import WorkOptions, open_work
from castalia.inference import quick
from castalia.monitor import read_metrics
from castalia.recipes import resolve
from castalia.results import KEY, ResultsStore
from castalia.train.events import read_events
from castalia.train.hooks import Hook
from castalia.train.run import run

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.hidden_dropout=0.2",
    "data.seq_length=16",
    "train.batch_size=4",
    "train.eval_every=2",
    "train.eval_batches=1",
    "train.recompute=true",
    "precision=bf16",
    "train.steps=4",
    "train.log_every=1",
    "checkpoint.every=2",
    "checkpoint.steps=[]",
    "checkpoint.asynchronous=false",
)
CHOSEN = ("lambada_local", "choices_local", "pronouns_local")
TIMES = {
    "time",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "model_tflops",
    "memory_bytes",
}
TIMES |= {"save_seconds", "save_stall_seconds", "load_seconds"}
FAULTY = """
import torch

calls = []


def process_results(doc, results):
    calls.append(doc)
    if len(calls) == 2:
        raise torch.OutOfMemoryError("out of memory, of a test")
    return {"acc": 1.0}
"""


class RandomNumbers(Hook):
    """What the global generators give in each step: a loss of a user may draw from them."""

    def __init__(self):
        self.drawn = []

    def start(self) -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)

    def after_step(self, step) -> None:
        self.drawn.append((random.random(), np.random.random(), torch.rand(1).item()))


@pytest.fixture(scope="module")
def train_here(tokens):
    """train_here(output, *overrides, hooks=()): a run in this process."""

    def train(output, *overrides, hooks=()):
        words = ["debug", *SMALL, f"data.train={tokens}", f"data.valid={tokens}"]
        words += [f"output={output}", *overrides]
        return run(resolve(words).config, ["castalia", "train", *words], hooks=hooks)

    return train


@pytest.fixture(scope="module")
def section(task_folder):
    """The overrides of a run that evaluates."""
    names = ",".join(str(task_folder / f"{name}.yaml") for name in CHOSEN)
    return (
        f"eval.tasks=[{names},bits_per_byte]",
        'eval.samples=["the owner", "two"]',
        "eval.sample_tokens=6",
        "eval.every=2",
        "eval.at_start=true",
        "eval.limit=5",
    )


@pytest.fixture(scope="module")
def whole(train_here, section, tmp_path_factory):
    """A run with evaluation, without an interruption; its folder, and what its hook drew."""
    output = tmp_path_factory.mktemp("evaluated") / "whole"
    numbers = RandomNumbers()
    prefix = f"eval.results_prefix={output}/neox"
    train_here(output, *section, prefix, hooks=[numbers])
    return output, numbers.drawn


def lines_of(output):
    return read_metrics(output / "metrics.jsonl")


def rows_of(output, columns="task, metric, step, value"):
    store = ResultsStore(output / "evals")
    return store.query(f"select {columns} from results order by {', '.join(KEY)}")[1]


def samples_in(output):
    return json.loads((output / "samples" / "samples.json").read_text())


def state_of(output, step):
    return json.loads((output / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def test_the_run_does_not_notice(whole, train_here, tmp_path):
    output, drawn = whole
    numbers = RandomNumbers()
    plain = tmp_path / "plain"
    train_here(plain, "eval.validations=false", hooks=[numbers])
    assert numbers.drawn == drawn
    for ours, theirs in zip(lines_of(output), lines_of(plain), strict=True):
        kept = {name: value for name, value in ours.items() if not name.startswith("eval")}
        assert {**kept, **dict.fromkeys(TIMES)} == {**theirs, **dict.fromkeys(TIMES)}
    ours = read(output / "checkpoints" / "step-00000004", prefix="")
    theirs = read(plain / "checkpoints" / "step-00000004", prefix="")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert state_of(output, 4) == state_of(plain, 4)
    assert not (plain / "evals").exists() and not (plain / "samples").exists()


def test_the_numbers_are_those_of_the_saved_checkpoint(whole, task_folder):
    """Rows agree in every column of the KEY: a later sweep finds the checkpoint evaluated."""
    output, _ = whole
    path = f"{output}/step4"
    model = castalia.load(path, engine="torch")
    labels = labels_of(path, model)
    place = Checkpoint(path, labels.suite, labels.model, 4, output, ())
    names = (*(str(task_folder / f"{name}.yaml") for name in CHOSEN), "bits_per_byte")
    works = open_work(WorkOptions(names, limit=5, bootstrap=1000))
    rows = [row for work in works for row in work.measure(model, place, labels).results]
    assert len(rows) == 7
    stored = ResultsStore(output / "evals").table().to_pylist()
    by_key = {tuple(row[name] for name in KEY): row for row in stored}
    line = lines_of(output)[3]
    for row in rows:
        other = by_key[tuple(getattr(row, name) for name in KEY)]
        assert other["value"] == row.value and other["stderr"] == row.stderr
        assert other["checkpoint"] == path and other["dtype"] == "fp32"
        assert other["parameters"] == row.parameters and other["tokens"] == row.tokens == 256
        assert line[f"eval/{row.task}/{row.metric}"] == row.value
    texts = [done.text for done in model.complete(["the owner", "two"], 6)]
    assert [sample["text"] for sample in samples_in(output) if sample["step"] == 4] == texts
    (newest,) = list(output.glob("neox_eval_results_*.json"))[-1:]
    assert set(json.loads(newest.read_text())["results"]) == set(CHOSEN)


def test_each_evaluation_is_there_once(whole, train_here, section, read_lines):
    """Steps 0, 2 and 4; the steps that run again give the same rows and samples once more."""
    output, _ = whole
    rows = rows_of(output)
    assert {row[2] for row in rows if "local" in row[0]} == {0, 2, 4}
    samples = samples_in(output)
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4]
    lines = read_lines(output)
    valid = [
        row[1:]
        for row in rows_of(output, "task_version, metric, dtype, step, value")
        if row[0] == "validation"
    ]
    assert valid == [("loss", "bf16 autocast", n, lines[n - 1]["valid_loss"]) for n in (2, 4)]
    seconds = [line.get("eval_seconds", 0.0) for line in lines]
    assert seconds[1] > 0 and seconds[3] > 0 and seconds[0] == seconds[2] == 0
    # Without its last checkpoint the run goes on from step 2.
    for path in (output / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (output / "checkpoints" / "step-00000004").rmdir()
    train_here(output, *section)
    assert rows_of(output) == rows and samples_in(output) == samples


def test_what_is_broken_off_is_made_up_for(
    whole, train_here, section, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"

    class Asks(Hook):
        def start(self, *, ask_stop) -> None:
            self.ask_stop = ask_stop

    asks = Asks()
    real = evaluation.samples_of

    def samples_of(config, model, step):
        if step == 4:
            asks.ask_stop()
        return real(config, model, step)

    monkeypatch.setattr(evaluation, "samples_of", samples_of)
    trainer = train_here(output, *section, hooks=[asks])
    assert (
        trainer.progress.evaluation_missing
        and state_of(output, 4)["progress"]["evaluation_missing"]
    )
    said = capsys.readouterr()
    assert "without its last evaluation" in said.out and "makes up for it" in said.out
    assert "failed" not in said.err and not (output / "events.jsonl").exists()
    assert {row[2] for row in rows_of(output) if "local" in row[0]} == {0, 2}
    monkeypatch.undo()
    train_here(output, *section)
    folder, _ = whole
    assert rows_of(output) == rows_of(folder) and samples_in(output) == samples_in(folder)
    keys = {name for name in lines_of(folder)[3] if name.startswith("eval")}
    assert {name for name in lines_of(output)[3] if name.startswith("eval")} == keys
    assert "evaluation_missing" not in lines_of(output)[3]


def test_a_fault_is_recorded_and_the_run_goes_on(train_here, section, tmp_path, capsys):
    (tmp_path / "faulty_functions.py").write_text(FAULTY)
    document, _, config = TASKS["lambada_local"]
    config = {**config, "process_results": "FUNCTION faulty_functions.process_results"}
    config["metric_list"] = [{"metric": "acc", **METRIC}]
    path = write_task(tmp_path, "faulty", [document(0)], config)
    output = tmp_path / "run"
    train_here(output, *section, f"eval.tasks=[{path}]", "eval.samples=[two]", "eval.every=2")
    (event,) = read_events(output)
    assert event == {
        "step": 2,
        "event": "evaluation",
        "action": "warn",
        "error": "task faulty: OutOfMemoryError: out of memory, of a test",
    }
    assert "step 2 failed in part: task faulty: OutOfMemoryError" in capsys.readouterr().err
    assert {row[2] for row in rows_of(output) if row[0] == "faulty"} == {0, 4}
    assert [sample["step"] for sample in samples_in(output)] == [0, 2, 4]
    assert lines_of(output)[3]["eval/faulty/acc"] == 1.0


def test_validations_of_other_text_are_another_question(train_here, tmp_path, tokens):
    with IndexedDatasetWriter(tmp_path / Path(tokens).name, "uint16") as writer:
        for start in range(40):
            writer.add(np.arange(start, start + 60))
    hashes = []
    for number, prefix in enumerate((tokens, tokens, tmp_path / Path(tokens).name)):
        output = tmp_path / f"run{number}"
        train_here(output, f"data.valid={prefix}", "train.steps=2")
        rows = rows_of(output, "task, task_hash, value")
        assert rows and len({row[:2] for row in rows}) == 1
        hashes.append(rows[0][:2])
    # The name of the source is the same, and its bytes are not.
    assert hashes[0] == hashes[1] and hashes[0][0] == hashes[2][0] and hashes[0] != hashes[2]


def test_a_model_with_quicker_products_hears_of_a_stop(train_here, section, tmp_path, monkeypatch):
    """The decoder under other modules, as large models have it, is watched as the first one is."""
    monkeypatch.setattr(quick, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(quick, "fastest", lambda *options: "fp32_onednn")
    passes = []
    before_pass = Peers.before_pass

    def counted(self, *inputs):
        passes.append(self)
        before_pass(self, *inputs)

    monkeypatch.setattr(Peers, "before_pass", counted)
    output = tmp_path / "run"
    tasks = "eval.tasks=[" + section[0].split("[")[1].split(",")[0] + "]"
    train_here(output, tasks, "eval.every=2", "train.steps=2")
    assert not (output / "events.jsonl").exists()
    assert len(passes) > 0 and len({id(peers) for peers in passes}) == 1
    assert {row[2] for row in rows_of(output) if "local" in row[0]} == {2}


class KilledError(BaseException):
    """Stands for what the kernel does: nothing of the run catches it."""


def test_an_evaluation_that_kills_the_run_is_left_out_at_the_third_time(
    train_here, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    words = ["eval.samples=[two]", "eval.sample_tokens=2", "eval.every=1", "eval.at_end=false"]
    words += ["train.eval_every=null", "checkpoint.every=100", "train.steps=2"]
    real = evaluation.samples_of
    steps = []

    def samples_of(config, model, step):
        steps.append(step)
        if step == 2:
            raise KilledError
        return real(config, model, step)

    monkeypatch.setattr(evaluation, "samples_of", samples_of)
    for _ in range(2):
        with pytest.raises(KilledError):
            train_here(output, *words)
    # The evaluation of step 1, which ends well each time, does not hide that of step 2.
    trainer = train_here(output, *words)
    assert steps == [1, 2, 1, 2, 1] and not trainer.progress.evaluation_missing
    assert "the evaluation of step 2 is left out: it ended the run" in capsys.readouterr().err
    assert [sample["step"] for sample in samples_in(output)] == [1]
    (event,) = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["event"]) == (2, "evaluation")
    # Other settings are tried.
    attempts = Attempts(output / evaluation.BEGUN, {"batch": 1})
    assert not attempts.are_over(2)
    attempts.begin(2)
    attempts.end(2)
    assert not attempts.path.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.tasks=[nowhere.yaml]"], "nowhere.yaml: no such task file"),
        (["eval.tasks=[bits_per_byte]", "data.valid=[]"], "reads the token files of data.valid"),
        (["eval.samples=[x]", "data.tokenizer=null"], "text needs a tokenizer"),
        (["eval.samples=[" + "x" * 600 + "]"], "has 600 tokens, but the model reads"),
    ],
)
def test_faults_of_the_config_come_before_the_first_step(train_here, tmp_path, overrides, message):
    with pytest.raises(CastaliaError, match=message):
        train_here(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
