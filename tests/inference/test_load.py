"""`castalia.load`: run folders, steps, devices, and clear errors."""

import shutil
from pathlib import Path

import pytest
import torch

import castalia
from castalia.core.errors import CheckpointError, ConfigError


def test_a_run_folder_means_its_newest_step(run_folder: Path) -> None:
    model = castalia.load(run_folder, engine="torch")
    assert model.step == 220
    assert model.tokenizer is not None and model.tokenizer.kind == "bytes"
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())
    assert model.config.num_layers == 2


@pytest.mark.parametrize("name", ["step0", "checkpoints/step-00000000", "0"])
def test_a_step_is_named_as_pythia_names_revisions(run_folder: Path, name: str) -> None:
    assert castalia.load(run_folder / name).step == 0


def test_a_missing_step_lists_those_there_are(run_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="0, 220"):
        castalia.load(run_folder / "step7")


def test_bf16_speaks_nearly_the_same(
    run_folder: Path, speaker: castalia.inference.LanguageModel
) -> None:
    half = castalia.load(run_folder, engine="torch", dtype="bf16", device="cpu")
    assert half.model.head_weight.dtype == torch.bfloat16
    ids = speaker.tokenizer.encode("The naïve café owner")
    assert (half.logprobs(ids) - speaker.logprobs(ids)).abs().max() < 0.5
    assert half.generate("The naïve", 8) == speaker.generate("The naïve", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int3"},
            "unknown dtype 'int3' for a checkpoint; choose one of fp32, bf16, fp16, auto, int8,"
            " int4",
        ),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"device": "cuda:99"}, "'cuda:99' does not exist"),
    ],
)
def test_wrong_options_are_named(run_folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        castalia.load(run_folder, **options)


def test_a_corrupt_checkpoint_does_not_speak(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "checkpoints" / "step-00000220"
    shutil.copytree(run_folder / "checkpoints" / "step-00000220", copy)
    weights = next(copy.glob("*.safetensors"))
    blob = bytearray(weights.read_bytes())
    blob[len(blob) // 2] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(CheckpointError, match=weights.name):
        castalia.load(copy)


def test_a_damaged_newest_checkpoint_of_a_run_is_passed_over(
    run_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    newest = copy / "checkpoints" / "step-00000220" / "model-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"model-00000\.safetensors.*using step-00000000 instead"):
        assert castalia.load(copy).step == 0
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors"):
        castalia.load(copy / "step220")
    oldest = copy / "checkpoints" / "step-00000000" / "model-00000.safetensors"
    oldest.write_bytes(oldest.read_bytes()[:-1])
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="step-00000000"):
        castalia.load(copy)
