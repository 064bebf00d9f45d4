"""Which checkpoints a path and --steps name."""

import json
import os
import shutil
from pathlib import Path

import pytest

from castalia.core.errors import CheckpointError, ConfigError
from castalia.eval.places import Checkpoint, Steps, checkpoints_of
from castalia.eval.single_models import hash_of
from castalia.export import export


@pytest.fixture(scope="module")
def suite(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs (one file copied, so that both are read), an export, and folders that are none."""
    folder = tmp_path_factory.mktemp("places") / "suite"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name / "checkpoints").mkdir(parents=True)
        for step in ("step-00000000", "step-00000220"):
            os.symlink(run_folder / "checkpoints" / step, folder / name / "checkpoints" / step)
    (folder / "begun" / "checkpoints").mkdir(parents=True)
    (folder / "evals").mkdir()
    list(export(run_folder, to="hf", output=folder / "hf", dtype="bf16", certificate=False))
    # As other programs write it, without our record.
    shutil.copytree(folder / "hf", folder / "plain", ignore=shutil.ignore_patterns("export.json"))
    return folder


def names(checkpoints: list[Checkpoint]) -> list[tuple[str, int | None]]:
    """Model and step of each."""
    return [(one.model, one.step) for one in checkpoints]


def test_a_run_is_its_newest_checkpoint_or_the_steps_that_are_asked_for(suite: Path):
    run = str(suite / "a")
    (newest,) = checkpoints_of([run])
    assert (newest.path, newest.suite, newest.model) == (f"{run}/step220", "suite", "a")
    assert newest.stores == (suite / "a" / "evals", suite / "evals")
    assert newest.weights_hash == hash_of(f"{run}/checkpoints/step-00000220")
    assert newest.title == "a step 220"
    assert names(checkpoints_of([run], "all")) == [("a", 0), ("a", 220)]
    assert names(checkpoints_of([f"{run}/checkpoints"], "0,last")) == [("a", 0), ("a", 220)]
    assert names(checkpoints_of([run], "1:")) == [("a", 220)]
    assert names(checkpoints_of([run], "0:220")) == [("a", 0), ("a", 220)]
    assert names(checkpoints_of([f"{run}/step0"])) == [("a", 0)]
    assert names(checkpoints_of([f"{run}@0", run, run])) == [("a", 0), ("a", 220)]
    (elsewhere,) = checkpoints_of([run], store=suite / "numbers")
    assert elsewhere.stores == (suite / "numbers",)


def test_two_spellings_of_a_path_are_one_checkpoint(suite: Path):
    (run,) = checkpoints_of([min(p for p in suite.iterdir() if (p / "checkpoints").is_dir())])
    folder = run.run
    assert folder is not None
    other = f"{folder.parent}/../{folder.parent.name}/{folder.name}/"
    assert checkpoints_of([folder, other]) == [run]


def test_a_suite_is_all_its_models(suite: Path):
    everything = checkpoints_of([str(suite)], "all")
    assert names(everything) == [
        ("a", 0),
        ("a", 220),
        ("b", 0),
        ("b", 220),
        ("hf", 220),
        ("plain", None),
    ]
    assert everything[0].stores == (suite / "evals", suite / "a" / "evals")
    assert everything[-1].stores == (suite / "evals",)
    assert names(checkpoints_of([str(suite)])) == [
        ("a", 220),
        ("b", 220),
        ("hf", 220),
        ("plain", None),
    ]


def test_a_folder_of_steps_is_one_model(suite: Path, tmp_path: Path):
    model = tmp_path / "family" / "pythia-9m"
    model.mkdir(parents=True)
    for step in (1, 64):
        os.symlink(suite / "hf", model / f"step{step}")
    found = checkpoints_of([str(model)], "all")
    assert names(found) == [("pythia-9m", 1), ("pythia-9m", 64)]
    assert {one.suite for one in found} == {"family"} and found[0].stores == (Path("evals"),)
    assert names(checkpoints_of([str(model)])) == [("pythia-9m", 64)]
    assert names(checkpoints_of([str(model.parent)])) == [("pythia-9m", 64)]


def test_the_hash_is_that_of_the_weights(suite: Path, tmp_path: Path):
    folder = suite / "hf"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((folder / name).read_bytes())
    assert hash_of(str(copy)) == hash_of(str(folder)) != hash_of(str(suite / "a" / "step220"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert hash_of(str(copy)) != hash_of(str(folder))


@pytest.mark.parametrize(
    "path, steps, message",
    [
        ("a", "1", r"a has no checkpoint of step 1; the nearest is 0 or 220; it has 0, 220"),
        ("a", "300:", "has no checkpoint from 300 to its end; it has 0, 220"),
        ("hf", "3", "hf has no checkpoint of step 3; the nearest is 220; it has 220"),
        ("plain", "3", "plain is one checkpoint, whose step is unknown; omit --steps"),
        ("a/step7", None, "step 7 was not saved"),
        ("c", None, "no checkpoint at"),
        ("begun", None, "begun has no complete checkpoint yet"),
        ("evals", None, "evals is no run and no model, and no folder in it is one"),
    ],
)
def test_what_does_not_exist_is_said_with_what_does(
    suite: Path, path: str, steps: str | None, message: str
):
    with pytest.raises(CheckpointError, match=message):
        checkpoints_of([str(suite / path)], steps)


@pytest.mark.parametrize("text", ["", "first", "1-5", ":", "1,,2", "-1"])
def test_malformed_steps_are_refused(text: str):
    with pytest.raises(ConfigError, match="expected all, last, steps between commas"):
        Steps.of(text)


def test_steps_of_a_hub_id_are_its_branches(own_hub, monkeypatch, tmp_path: Path):
    from tests.fixtures.hub_server import Repo

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", own_hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = Repo(private=False)
    own_hub.repos["me/toy"] = repo
    for step in (0, 8, 512):
        repo.branches[f"step{step}"] = [(f"{step:040d}", {})]
    found = checkpoints_of(["hf://me/toy"], "8:")
    assert [one.path for one in found] == ["hf://me/toy@step8", "hf://me/toy@step512"]
    assert names(found) == [("toy", 8), ("toy", 512)] and found[0].suite == "me"
    assert found[1].weights_hash == f"{512:040d}"[:16]
    before = len(own_hub.requests)
    (main,) = checkpoints_of(["hf://me/toy"])
    assert (main.path, main.step, main.weights_hash) == ("hf://me/toy", None, None)
    assert names(checkpoints_of(["hf://me/toy@step8"])) == [("toy", 8)]
    assert len(own_hub.requests) == before  # nothing to list
    own_hub.answers["refs"] = 500
    with pytest.raises(CheckpointError, match="cannot list the revisions of hf://me/toy"):
        checkpoints_of(["hf://me/toy"], "all")
    # What was downloaded before is known without the hub.
    refs = tmp_path / "models--me--toy" / "refs"
    refs.mkdir(parents=True)
    (refs / "step8").write_text(json.dumps(8))
    assert names(checkpoints_of(["hf://me/toy"], "all")) == [("toy", 8)]
