"""Evaluation in training on two ranks: the numbers of one, each document once, and one's faults."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.fixtures.harness_tasks import METRIC, TASKS, write_task

from castalia.data import IndexedDatasetWriter
from castalia.recipes import resolve
from castalia.results import KEY, ResultsStore
from castalia.train.run import run

SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")
BASE = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.steps=2",
    "checkpoint.steps=[0]",
    "checkpoint.every=null",
    "eval.samples=[two]",
    "eval.sample_tokens=6",
    "eval.at_start=true",
)
LAYOUTS = {
    "sharded": ["parallel.dp_shard=2", "train.micro_batch_size=1"],
    "split matrices": ["parallel.tp=2"],
    "two stages, tied": ["parallel.pp=2", "model.tie_word_embeddings=true"],
}
CHOSEN = ("lambada_local", "choices_local", "pages_local", "pronouns_local")
ON_RANK_1 = """
import os
import signal


def fails(doc, results):
    if os.environ["RANK"] == "1":
        raise ValueError("a fault of rank 1")
    return {"acc": 1.0}


def stops(doc, results):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return {"acc": 1.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def words(task_folder, folder):
    """words(name, *overrides): the command of a run in the folder `name`."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "text", "uint16") as writer:
        for size in random.integers(20, 60, 40):
            writer.add(random.integers(97, 123, size))
    files = ",".join(str(task_folder / f"{name}.yaml") for name in CHOSEN)

    def command(name, *overrides):
        own = [f"data.train={folder / 'text'}", f"eval.tasks=[{files}]", f"output={folder / name}"]
        return [*BASE, *own, *overrides]

    return command


@pytest.fixture(scope="module")
def two(words, task_folder, folder, program) -> Path:
    """All runs on two ranks, in one set of processes."""
    (folder / "rank_functions.py").write_text(ON_RANK_1)
    runs = [words(name, *layout) for name, layout in LAYOUTS.items()]
    for name in ("fails", "stops"):
        document, _, config = TASKS["lambada_local"]
        function = {"process_results": f"FUNCTION rank_functions.{name}"}
        metrics = {"metric_list": [{"metric": "acc", **METRIC}]}
        path = write_task(folder, name, [document(0)], {**config, **function, **metrics})
        tasks = f"eval.tasks=[{path},{task_folder / 'pages_local.yaml'}]"
        runs.append(words(f"one {name}", tasks, "train.micro_batch_size=1", "eval.at_start=false"))
    spec = folder / "runs.json"
    spec.write_text(json.dumps([{"ranks": 2, "runs": [{"arguments": each} for each in runs]}]))
    # Loaded before the forks.
    modules = ("castalia.eval.harness.evaluate", "castalia.eval.harness.model")
    done = program(SEVERAL_RUNS, spec, *modules)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def rows_of(run_folder, step):
    """Value by task and metric; every row once."""
    answer = ResultsStore(run_folder / "evals").query(
        "select task, metric, value, documents from results where step = ?"
        f" order by {', '.join(KEY)}",
        [step],
    )
    rows = {row[:2]: row[2:] for row in answer[1]}
    assert len(rows) == len(answer[1])
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_give_the_numbers_of_one(two, words, name):
    tied = [text for text in LAYOUTS[name] if text.startswith("model.")]
    alone = f"{name}, alone"
    run(resolve(words(alone, *tied)).config, command=["castalia"])
    # The start weights are the same bits on every layout; after two steps sums are rounded.
    for step, limit in ((0, 1e-5), (2, 1e-3)):
        ours = rows_of(two / name, step)
        theirs = rows_of(two / alone, step)
        assert ours.keys() == theirs.keys() and len(ours) == 8
        for key, (value, documents) in ours.items():
            assert value == pytest.approx(theirs[key][0], rel=limit), key
            assert documents == theirs[key][1], key
    samples = [
        json.loads((two / run / "samples/samples.json").read_text()) for run in (name, alone)
    ]
    assert [sample["step"] for sample in samples[0]] == [0, 2]
    assert samples[0][0] == samples[1][0]


def test_the_fault_of_one_rank_ends_its_task_alone(two):
    (event,) = map(json.loads, (two / "one fails" / "events.jsonl").read_text().splitlines())
    assert event["error"].startswith("task fails: ")
    assert "rank 1: ValueError: a fault of rank 1" in event["error"]
    assert {task for task, _ in rows_of(two / "one fails", 2)} == {"pages_local"}
    assert len((two / "one fails" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stop_of_one_rank_breaks_off_on_all(two):
    state = two / "one stops" / "checkpoints" / "step-00000002" / "state.json"
    assert json.loads(state.read_text())["progress"]["evaluation_missing"]
    assert not (two / "one stops" / "evals").exists()
    assert not (two / "one stops" / "events.jsonl").exists()
