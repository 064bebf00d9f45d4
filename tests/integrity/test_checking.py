"""`castalia verify` finds what was changed, and says for which files nothing vouches."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import sha256_of
from castalia.core.sealed import Seal, SealedFiles, check_sealed
from castalia.corpus import prepare
from castalia.data import IndexedDataset
from castalia.data.order_cache import write_maps
from castalia.export.exports import export
from castalia.integrity import check_folders
from castalia.stream.index.building import build_index


def flip(path, at=-1):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def house(four_steps, tmp_path_factory):
    """A folder with a run and an export of it."""
    folder = tmp_path_factory.mktemp("house")
    run = folder / four_steps.name
    shutil.copytree(four_steps, run, ignore=shutil.ignore_patterns("evals", "exports", "*0001"))
    list(export(run, to="native", output=folder / "exports"))
    return folder


@pytest.fixture
def copy(house, tmp_path):
    return shutil.copytree(house, tmp_path / "house")


def run_verb(*words):
    """Exit status and output of `castalia verify`."""
    result = CliRunner().invoke(app, ["verify", *map(str, words)])
    return result.exit_code, result.stdout


def test_whole_folders(house):
    status, out = run_verb(house)
    assert status == 0, out
    assert "all whole" in out
    kinds = [folder.kind for folder in check_folders([house])]
    assert {"run", "checkpoint", "export"} <= set(kinds)


@pytest.mark.parametrize(
    "pattern",
    [
        "*/checkpoints/*/model*.safetensors",
        "*/checkpoints/*/manifest.json",
        "exports/*.safetensors",
    ],
)
def test_a_flip_and_a_missing_file_are_found(copy, pattern):
    file = sorted(copy.glob(pattern))[0]
    flip(file)
    status, out = run_verb(copy)
    assert status == 1
    assert str(file) in out
    assert "1 damaged" in out
    file.unlink()
    status, out = run_verb(copy, "--json")
    assert status == 1
    wrong = [file for folder in json.loads(out) for file in folder["files"] if file["fault"]]
    assert len(wrong) == 1
    assert "missing" in wrong[0]["fault"]


def test_words_that_name_a_run_or_a_step(house):
    (run,) = [path.parent for path in house.glob("*/checkpoints")]
    (step,) = check_folders([f"{run}/step2"])
    assert step.kind == "checkpoint" and step.path.endswith("checkpoints/step-00000002")
    assert [folder.path for folder in check_folders([f"{run}@2"])] == [step.path]
    assert next(check_folders([run / "config.yaml"])).path == str(run)
    with pytest.raises(CheckpointError, match=r"step 9 was not saved.*choose one of 0, "):
        next(check_folders([f"{run}/step9"]))


def test_a_folder_without_anything_of_ours(tmp_path):
    with pytest.raises(ConfigError, match="holds nothing that Castalia wrote"):
        list(check_folders([tmp_path]))
    with pytest.raises(ConfigError, match="no such path"):
        list(check_folders([tmp_path / "absent"]))


def test_a_content_is_hashed_once_and_a_changed_one_again(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc" * 1000)
    seal = Seal(sha256_of(file), 3000)
    seen = SealedFiles()
    assert seen.fault(file, seal) is None
    monkeypatch.setattr("hashlib.file_digest", None)  # a second reading would fail
    assert seen.fault(file, seal) is None
    monkeypatch.undo()
    flip(file, 5)
    assert "SHA-256" in seen.fault(file, seal)
    with pytest.raises(CheckpointError, match="is missing; export it again"):
        check_sealed({tmp_path / "b": seal}, "export it again")


def test_logs_and_files_of_a_run(house, copy, four_steps):
    run = copy / four_steps.name
    covered = {
        file.path.removeprefix(f"{house}/{four_steps.name}/"): file.by
        for folder in check_folders([house])
        for file in folder.files
    }
    assert covered["metrics.jsonl"] == "CRC-32 in each line"
    assert covered["config.yaml"] == covered["env.json"] == "SHA-256 in env.json"
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("config.yaml", "command.txt"):
        flip(run / name, -4)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], lines[2]]))
    status, out = run_verb(run)
    assert status == 1
    assert "3 damaged" in out
    assert "line 2: the line that it was written behind does not stand before it" in out
    assert "it ends with step 3, and a checkpoint relies on its step 4" in out
    (run / "metrics.jsonl").unlink()
    flip(run / "env.json", 5)
    assert "env.json is not what the last start of the run wrote" in run_verb(run)[1]
    assert "metrics.jsonl is missing; a checkpoint relies on its step 4" in run_verb(run)[1]


def test_token_files_and_their_index(tmp_path):
    """Every file of a prepared prefix, of its index, and of kept index maps: flipped and lost."""
    pytest.importorskip("pydivsufsort", reason="pip install 'castalia[trace]'")
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"broken\n{"text": "three"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "t" / "p", "bytes", reject=True)
    build_index(IndexedDataset(tmp_path / "t" / "p"), part_tokens=8, workers=1)
    maps = {"documents": np.arange(9)}
    write_maps(tmp_path / "t" / "p.order" / "neox-1.safetensors", {"order": "neox"}, maps)
    folders = list(check_folders([tmp_path / "t"]))
    assert [folder.kind for folder in folders] == ["token files", "index", "index maps"]
    files = {file.path: file for folder in folders for file in folder.files}
    assert {path.name for path in (tmp_path / "t").iterdir() if path.is_file()} <= {
        name.rsplit("/", 1)[1] for name in files
    }
    dice = random.Random(0)
    for name, file in files.items():
        path = Path(name)
        whole = path.read_bytes()
        assert file.by and not file.fault and file.size == len(whole), file
        for place in (0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(6))):
            flip(path, place)
            damaged = [
                file for folder in check_folders([tmp_path / "t"]) for file in folder.damaged
            ]
            assert name in {file.path for file in damaged}, place
            assert all(file.fault.startswith(file.path) for file in damaged)
            path.write_bytes(whole)
        path.unlink()
        lost = any(folder.damaged for folder in check_folders([tmp_path / "t"]))
        assert lost or path.suffix == ".safetensors"  # such maps are built again
        path.write_bytes(whole)
