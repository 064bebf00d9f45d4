"""Branches of a run: the control ends in the run's own bits, and the dry run tells what changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.runs.rows import rows_as_trained
from castalia.stream.opening import open_stream
from castalia.studies.branching import compared, other_rows, plan_branch, threads_of, train_branch
from castalia.studies.dry_runs import reported
from castalia.train.run import run

SWAP = "interventions=[{kind: swap, terms: [[he, she]], length: fit, sources: [a]}]"
NOTHING = "interventions=[{kind: regex, pattern: zebra, replacement: lion}]"
EVERY = ("checkpoint.every=4", "checkpoint.steps=[]", "optim.lr=1e-2")
VARIANTS = {
    "fp32": ("model.hidden_dropout=0.1",),
    "mixed": ("precision=bf16", "mixing.kind=odm", "data.weights=null"),
}


@pytest.fixture(params=VARIANTS)
def parent(config_with, request):
    """The folder of a finished run, and its name."""
    config = config_with((), *EVERY, *VARIANTS[request.param])
    run(config, ["castalia", "train"])
    return config.output, request.param


def asked(*words):
    done = CliRunner().invoke(app, ["intervene", *words, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_a_branch_has_as_many_threads_as_its_run(tmp_path):
    threads = torch.get_num_threads()
    with threads_of(tmp_path):
        assert torch.get_num_threads() == threads
    (tmp_path / "env.json").write_text(json.dumps({"threads": threads + 1}))
    with threads_of(tmp_path):
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


def test_a_branch_that_changes_nothing_and_one_that_swaps(parent, tmp_path):
    folder, kind = parent
    report = asked(folder, SWAP, "--at", "6", "--examples", "3")
    assert (report["at"], report["checkpoint"], report["steps"]) == (6, 4, [6, 12])
    assert report["rows"] == 24 and 0 < report["rows_changed"] < 24
    assert report["tokens_changed"] == sum(step["tokens_changed"] for step in report["by_step"])
    assert list(report["by_source"]) == ["a"] and len(report["examples"]) == 3
    assert all("he" in example["before"].lower() for example in report["examples"])
    result = asked(folder, SWAP, "--at", "6", "--run", "--name", "her")
    # The control, whose weights and moments are compared, in fp32 and bf16, packed and mixed.
    assert result["control_and_run"] == {"steps": [8, 12], "equal": True, "difference": None}
    changed = [step["step"] for step in report["by_step"]]
    if kind == "fp32":
        assert result["steps_with_other_rows"] == changed
    branch = tmp_path / "run-from-4-her"
    assert json.loads((branch / "intervention.json").read_text()) == result
    differs = compared(tmp_path / "run", branch, 4)
    assert differs["equal"] is False and differs["difference"]["largest"] > 0
    # The rows of a branch can be read, also those that its parent's mixer chose before it.
    stream = open_stream(str(branch))
    parents = open_stream(folder)
    places = parents.places(0, 6)
    assert (stream.block(places).tokens == parents.block(places).tokens).all()
    # A change that matches nothing: another hash, the same weights. The control is there already.
    plan = plan_branch(folder, "50%", [NOTHING], name="nothing")
    said = []
    train_branch(plan, said.append)
    assert "trained" in said[0] and "training" in said[1]
    assert compared(tmp_path / "run", tmp_path / "run-from-4-nothing", 4)["equal"]
    assert other_rows(tmp_path / "run", tmp_path / "run-from-4-nothing") == []
    # Other interventions or settings under a name that is taken.
    other = plan_branch(folder, "50%", [SWAP], name="nothing")
    with pytest.raises(ConfigError, match=r"nothing was trained as another .*interventions were"):
        train_branch(other, said.append)
    faster = plan_branch(folder, "50%", [NOTHING, "optim.lr=0.5"], name="nothing")
    with pytest.raises(ConfigError, match=r"control was trained .*optim.lr was 0.01, is 0.5; cho"):
        train_branch(faster, said.append)
    if kind == "mixed":
        return
    resumed = plan.changed.model_copy(
        update={"data": plan.changed.data.model_copy(update={"interventions": []})}
    )
    with pytest.raises(DataError, match=r"data.interventions were .*, are none"):
        run(resumed, ["castalia", "train"])


def test_where_a_run_cannot_branch(config_with, tmp_path):
    config = config_with((), *EVERY)
    run(config, ["castalia", "train"])
    folder = config.output
    with pytest.raises(ConfigError, match=r"--at 12: step 12, but .* has steps 0 to 11"):
        plan_branch(folder, "12", [SWAP])
    with pytest.raises(ConfigError, match="--at soon: expected a step or a share"):
        plan_branch(folder, "soon", [SWAP])
    with pytest.raises(ConfigError, match="name what changes"):
        plan_branch(folder, "6", ["train.log_every=1"])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match=r"no checkpoint up to step 6; those .*: 8, 12"):
        plan_branch(folder, "6", [SWAP])
    states = list(tmp_path.glob("run/checkpoints/step-*/state.json"))
    for state in states:
        state.write_text("{}")
    with pytest.raises(CheckpointError, match="hold weights alone"):
        plan_branch(folder, "9", [SWAP])
    for place in tmp_path.glob("run/checkpoints/step-*"):
        shutil.rmtree(place)
    with pytest.raises(CheckpointError, match="no checkpoint to branch from"):
        plan_branch(folder, "9", [SWAP])
    (tmp_path / "empty.yaml").write_text("train: {steps: 3}\n")
    with pytest.raises(ConfigError, match="expected `interventions:`"):
        plan_branch(folder, "9", [f"{tmp_path}/empty.yaml"])


def test_a_dry_run_collects_what_training_would_stop_at(config_with):
    config = config_with((), *EVERY, "train.steps=8")
    run(config, ["castalia", "train"])
    words = ["interventions=[{kind: regex, pattern: doctor, replacement: doctor of arts}]"]
    plan = plan_branch(config.output, "4", words)
    report = reported(rows_as_trained(plan.planned)[1], plan, None, 2)
    assert report.rows_refused and "length: refuse" in report.refused[0]
    assert not report.rows_changed
    # Neither is the control trained, which comes first: it may take days.
    done = CliRunner().invoke(app, ["intervene", config.output, *words, "--at", "4", "--run"])
    assert isinstance(done.exception, ConfigError) and "nothing is trained" in str(done.exception)
    assert not Path(plan.folder("control")).exists()
    moved = [*words, "data.train=[gone]"]
    done = CliRunner().invoke(app, ["intervene", config.output, *moved, "--at", "4"])
    assert "the data that the run trained on are gone: gone.bin" in str(done.exception)
    with pytest.raises(ConfigError, match="expected A:B"):
        reported(rows_as_trained(plan.planned)[1], plan, "x", 2)
