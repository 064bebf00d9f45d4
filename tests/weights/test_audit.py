"""The audit finds each fault that was published about Pythia's revisions, and none on clean ones.

Numbers in the names of tests are those of issues of github.com/EleutherAI/pythia.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.weights.conftest import STEPS, write_revision

from castalia.cli.app import app
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import sha256_of
from castalia.models.init import init_parameter
from castalia.weights.audit import audit

FIRST = "model-00001-of-00002.safetensors"
LAST = STEPS[-1]


@pytest.fixture
def planted(published, tmp_path) -> Path:
    """A copy of the revisions, to be spoiled."""
    folder = tmp_path / published.name
    shutil.copytree(published, folder)
    return folder


def found(folder: Path, **options) -> list[tuple[str, str]]:
    """(kind, place relative to the folder) of each finding, sorted."""
    report = audit(str(folder), **options)
    return sorted((each.kind, relative(each.where, folder)) for each in report.findings)


def relative(where: str, folder: Path) -> str:
    """A place without the folder in front."""
    return where.removeprefix(str(folder)).removeprefix("/")


def copy_weights(source: Path, target: Path, names: str = "*") -> None:
    """Serve files of one revision in another."""
    for file in source.glob(f"{names}.safetensors"):
        shutil.copy(file, target / file.name)


def noised(tensors: dict[str, torch.Tensor], size: float) -> dict[str, torch.Tensor]:
    """The weights after a little more training, by chance."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def test_clean_checkpoints_have_no_finding(learning, published):
    report = audit([str(learning), str(published)])
    assert report.findings == []
    assert report.checked["models"] == 2
    assert report.checked["revisions"] == 2 * len(STEPS)
    # Read as one suite and by step: 16 tensors in each.
    assert report.checked["tensors"] == 2 * len(STEPS) * 16
    assert len(list((published / "step4").glob("*.safetensors"))) == 2


def test_step_1_may_equal_step_0_only_where_the_rate_was_zero(planted, learning):
    renamed = planted.rename(planted.with_name("other"))
    assert found(renamed) == [("same_weights", "step1")]
    assert found(renamed, still_until=1) == []
    # 198, 83: a step 2 that is step 0, whose rate was not 0.
    copy_weights(renamed / "step0", renamed / "step2")
    assert found(renamed, still_until=1) == [("same_weights", "step2")]
    (finding,) = audit(str(renamed), still_until=1).findings
    assert "all 16 tensors equal those of step0" in finding.what
    shutil.copytree(renamed / "step4", renamed / "main")
    expected = [("order", "main"), ("same_weights", "step2")]
    assert found(renamed, still_until=1) == expected


def test_205_branches_of_the_final_era(planted, weights):
    for step in (2, 4, 8, 10):
        copy_weights(planted / f"step{LAST}", planted / f"step{step}")
    # Not identical, but of the end of training.
    write_revision(planted / "step6", noised(weights[LAST], 2e-4))
    shutil.copytree(planted / f"step{LAST}", planted / "main")
    assert found(planted) == [
        ("order", "step6"),
        *sorted(("same_weights", f"step{step}") for step in (2, 4, 8, 10)),
    ]
    whats = [each.what for each in audit(str(planted)).findings if each.kind == "same_weights"]
    assert all(f"equal those of step{LAST}" in what for what in whats)
    assert not any("unknown" in what for what in whats)


def test_206_first_shard_of_the_final_model(planted):
    for step in (6, 10):
        copy_weights(planted / f"step{LAST}", planted / f"step{step}", FIRST.split(".")[0])
    expected = [("same_shard", f"step10/{FIRST}"), ("same_shard", f"step6/{FIRST}")]
    assert found(planted) == expected
    assert f"of step{LAST}" in audit(str(planted)).findings[0].what
    # Of a step that is not there, only the distances tell.
    shutil.rmtree(planted / f"step{LAST}")
    shutil.rmtree(planted / "step10")
    assert found(planted) == [("mixed_shard", f"step6/{FIRST}")]


def test_a_tensor_of_another_step_in_the_one_file(planted, weights):
    for step in STEPS:
        write_revision(planted / f"step{step}", weights[step], "5GB")
    name = "layers.0.mlp.up.weight"
    spoiled = weights[8] | {name: weights[14][name]}
    write_revision(planted / "step8", spoiled, "5GB")
    assert found(planted) == [("same_tensors", "step8")]
    assert name in audit(str(planted)).findings[0].what


def test_107_a_revision_out_of_order(planted, weights):
    copy_weights(planted / "step2", planted / "step12")
    write_revision(planted / "step12", noised(weights[2], 1e-4))
    assert found(planted) == [("order", "step12")]
    (finding,) = audit(str(planted)).findings
    assert "are nearest to step0 and step2, not to the neighbours of step12" in finding.what
    # Two that are exchanged, neighbours of each other.
    write_revision(planted / "step12", weights[10])
    write_revision(planted / "step10", weights[12])
    assert found(planted) == [("order", "step10"), ("order", "step12")]
    # Weights of another model.
    write_revision(planted / "step10", weights[10])
    write_revision(planted / "step12", noised({n: 0 * t for n, t in weights[12].items()}, 0.05))
    assert found(planted) == [("order", "step12")]
    assert "far from those of every other" in audit(str(planted)).findings[0].what


def test_202_missing_revisions(planted):
    shutil.rmtree(planted / "step6")
    grid = "0,1,2:14:2"
    assert found(planted, expect=grid) == [("extra", ""), ("missing", "")]
    missing = next(f for f in audit(str(planted), expect=grid).findings if f.kind == "missing")
    assert missing.what == "1 of 9 expected revisions are missing: 6"
    assert "148 of 154" in audit(str(planted), expect="pythia").findings[0].what
    with pytest.raises(ConfigError, match="'2:x' is not a step"):
        audit(str(planted), expect="0,2:x")


def test_203_a_run_that_does_not_descend_from_its_step_0(planted, published, learning, tmp_path):
    config = audit_config(learning)
    other = {
        name: init_parameter(name, tensor.shape, config, 7)
        for name, tensor in load_all(planted / "step0").items()
    }
    seed7 = tmp_path / "seed7"
    for step in (0, 1):
        write_revision(planted / f"step{step}", other)
    assert found(planted) == [("descent", "step0")]
    write_revision(seed7 / "step0", load_all(published / "step0"))
    report = audit([str(planted), str(seed7)])
    (finding,) = [each for each in report.findings if each.kind == "descent"]
    assert finding.what.endswith("they come from the step 0 of seed7")


def audit_config(run: Path):
    """The model's config of a run."""
    from castalia.formats.saved_model import open_model

    return open_model(run).config


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a revision."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_162_a_config_with_layers_and_heads_exchanged_and_other_files(planted):
    config = {"model_type": "gpt_neox", "num_hidden_layers": 4, "num_attention_heads": 2}
    (planted / "step6" / "config.json").write_text(json.dumps(config))
    for step in STEPS[1:]:
        (planted / f"step{step}" / "tokenizer.json").write_text("{}")
    assert found(planted) == [
        ("config", "step6/config.json"),
        ("config", "step6/config.json"),
        ("files", "step0"),
    ]
    assert audit(str(planted)).findings[1].what == (
        "num_attention_heads is 2; the other revisions have 4"
    )


def test_tensors_that_are_missing_more_misshapen_or_nan(planted, weights):
    bias = "layers.0.mlp.up.bias"
    spoiled = dict(weights[6])
    del spoiled[bias]
    write_revision(planted / "step6", spoiled | {"more": torch.zeros(2)})
    write_revision(planted / "step8", weights[8] | {bias: weights[8][bias][:5]})
    spoiled = {name: tensor.clone() for name, tensor in weights[10].items()}
    spoiled[bias][3:5] = torch.tensor([float("nan"), float("inf")])
    write_revision(planted / "step10", spoiled)
    whats = {
        each.kind + relative(each.where, planted): each.what for each in audit(str(planted))[0]
    }
    assert whats["tensorsstep6"] == "has the tensor more, which the others lack"
    assert whats["tensorsstep8"].startswith(f"{bias} is float16 [5]; the other revisions: float16")
    nan = next(what for where, what in whats.items() if where.startswith("not_finitestep10"))
    assert nan == f"{bias} has 2 elements that are NaN or infinite"


def test_hashes_shards_and_the_command(planted, tmp_path, capsys):
    listed = tmp_path / "hashes.txt"
    files = sorted(planted.glob("step*/*.safetensors"))
    lines = [f"{file.relative_to(planted)} {sha256_of(file)}\n" for file in files]
    listed.write_text("".join(lines))
    assert found(planted, hashes=str(listed)) == []
    tensors = load_file(planted / "step2" / FIRST)
    save_file(tensors | {next(iter(tensors)): next(iter(tensors.values())) + 1e-3}, files[4])
    (planted / "step4" / FIRST).unlink()
    listed.write_text("".join(lines[1:]))
    with pytest.raises(SystemExit) as ended:
        app(["audit", str(planted), "--hashes", str(listed), "--json"], standalone_mode=True)
    assert ended.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False and answer["checked"]["revisions"] == len(STEPS) - 1
    kinds = [(each["kind"], relative(each["where"], planted)) for each in answer["findings"]]
    assert ("hash", str(files[0].relative_to(planted))) in kinds
    assert ("hash", f"step4/{FIRST}") in kinds
    assert ("damaged", "step4") in kinds
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        audit(str(tmp_path / "nothing"))


def test_the_cache_of_the_hub_and_pickled_weights(published, weights, tmp_path):
    cache = tmp_path / "models--EleutherAI--pythia-0.1m"
    for step in (0, 1, 2, 4):
        commit = f"{step:040d}"
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / f"step{step}").write_text(commit)
        shutil.copy(published / "step0" / "config.json", snapshot / "config.json")
        torch.save(weights[step], snapshot / "pytorch_model.bin")
        blob = cache / "blobs" / sha256_of(snapshot / "pytorch_model.bin")
        blob.parent.mkdir(exist_ok=True)
        (snapshot / "pytorch_model.bin").rename(blob)
        (snapshot / "pytorch_model.bin").symlink_to(blob)
    assert found(cache) == []
    with open(blob, "ab") as file:
        file.write(b"0")
    assert ("hash", f"snapshots/{4:040d}/pytorch_model.bin") in found(cache)


def test_faults_of_a_run(learning, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(learning, run)
    steps = run / "checkpoints"
    (steps / "step-00000001" / "notes.txt").write_text("mine")
    with open(next((steps / "step-00000002").glob("model-*")), "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    (steps / "step-00000004" / "COMPLETE").unlink()
    shutil.rmtree(steps / "step-00000006")
    (steps / "step-00000008").rename(steps / "step-00000009")
    assert found(run) == [
        ("damaged", "checkpoints/step-00000002"),
        ("damaged", "checkpoints/step-00000009"),
        ("files", "checkpoints/step-00000001/notes.txt"),
        ("incomplete", "checkpoints/step-00000004"),
        ("missing", ""),
    ]
    assert "3 of 10 expected revisions are missing: 4, 6, 8" in str(audit(str(run)).findings)
    # Weights of another step are named: a flipped bit is not.
    (changed,) = (steps / "step-00000002").glob("model-*")
    shutil.copy(next((steps / "step-00000010").glob("model-*")), changed)
    what = [finding.what for finding in audit(str(run)).findings if finding.kind == "damaged"]
    assert [text.endswith("; it is that of step10") for text in what] == [True, False]


def test_start_weights_of_another_seed(learning, tmp_path):
    from castalia.checkpoint import Store

    run = tmp_path / "small"
    shutil.copytree(learning, run)
    folder = run / "checkpoints" / "step-00000000"
    config = audit_config(run)
    texts = {name: (folder / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    state = json.loads((folder / "state.json").read_text())
    from castalia.checkpoint import read

    tensors = {
        f"model.{name}": init_parameter(name, tensor.shape, config, 99)
        for name, tensor in read(folder).items()
    }
    shutil.rmtree(folder)
    Store(run / "checkpoints").save(0, tensors, state, texts, asynchronous=False)
    kinds = dict(found(run))
    assert kinds["start"] == "checkpoints/step-00000000"
    # Step 1 is no longer step 0, and has nothing in common with it.
    assert kinds["descent"] == "checkpoints/step-00000000"
