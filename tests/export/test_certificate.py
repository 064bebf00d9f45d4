"""The certificate of an export: numbers that a reader can measure again, bounds that refuse."""

import hashlib
import json
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch

from castalia.core.errors import CastaliaError, CheckpointError, ConfigError
from castalia.export import certificate, export, import_model, importing
from castalia.export.certificate import LENGTHS, compared, fixed_prompts
from castalia.export.formats import HuggingFace
from castalia.formats.saved_model import SavedModel
from castalia.inference import load
from castalia.inference.native_engine import NativeEngine


def written(folder: Path) -> dict:
    """certificate.json."""
    return json.loads((folder / "certificate.json").read_text())


def test_prompts_are_a_function_of_the_vocabulary() -> None:
    prompts = fixed_prompts(50277, 2048)
    assert [len(ids) for ids in prompts] == list(LENGTHS)
    # Counted through all prompts, so that none repeats another.
    flat = [token for ids in prompts for token in ids]
    assert flat == [(n * 2654435761 % 2**32) * 50277 // 2**32 for n in range(len(flat))]
    assert len(set(flat)) == len(flat) and max(flat) > 49000 and min(flat) < 1000
    assert [len(ids) for ids in fixed_prompts(300, 10)] == [1, 3, 10, 10, 10]
    assert all(0 <= token < 7 for ids in fixed_prompts(7, 64) for token in ids)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_number_is_that_of_transformers(run_folder: Path, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    (done,) = export(run_folder, to="hf", dtype=dtype, output=tmp_path / "out")
    # The certificate is measured with the engine whose numbers are the definition.
    ours = load(run_folder, engine="torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    worst = 0.0
    for ids in fixed_prompts(257, 256):
        with torch.no_grad():
            got = theirs(torch.tensor([ids])).logits[0].float()[:, :257]
        worst = max(worst, (got - ours.logits(ids)[:, :257]).abs().max().item())
    found = written(tmp_path / "out")
    assert found == done.certificate
    assert found["largest_difference"] == pytest.approx(worst, rel=1e-3, abs=1e-6)
    assert (worst < 1e-4) == (dtype == "fp32") and worst < 0.5
    assert found["largest_logit"] > 5 and found["same_greedy"] > 0.9 and found["finite"]
    assert found["target"]["program"] == f"transformers {transformers.__version__}"
    assert (found["source"]["numbers"], found["target"]["numbers"]) == ("fp32", dtype)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{found['largest_difference']:.3g}" in card and "## Certificate" in card
    assert f"`{found['target']['sha256']['model.safetensors']}`" in card


def test_the_hashes_are_those_of_both_ends(run_folder: Path, tmp_path: Path) -> None:
    (done,) = export(run_folder, to="native", quantization="int8", output=tmp_path / "out")
    found = written(tmp_path / "out")
    manifest = Path(done.checkpoint) / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert found["source"]["sha256"] == {"manifest.json": digest}
    assert found["source"]["name"] == "step-00000220" and found["target"]["name"] == "out"
    for name, value in found["target"]["sha256"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == value
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files - set(found["target"]["sha256"]) == {
        "README.md",
        "certificate.json",
        "export.json",
    }
    assert found["target"]["numbers"] == "int8" and "engine=native" in found["target"]["program"]
    assert 0 < found["largest_difference"] < 5


def test_a_larger_difference_writes_nothing(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CastaliaError) as refused:
        list(export(run_folder, to="hf", dtype="bf16", output=out, max_difference=1e-6))
    number = str(refused.value).partition(" is ")[2].split(",")[0]
    assert float(number) > 1e-3 and "max_difference is 1e-06" in str(refused.value)
    assert refused.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    list(export(run_folder, to="hf", output=out, max_difference=1e-4))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CastaliaError, match="was not written"):
        list(export(run_folder, dtype="fp16", output=out, max_difference=0.0, force=True))
    assert (out / "model.safetensors").read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_bounds_that_make_no_sense_are_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_difference must be >= 0, got -1"):
        export(run_folder, output=tmp_path / "out", max_difference=-1.0)
    with pytest.raises(ConfigError, match="max_difference must be >= 0, got nan"):
        export(run_folder, output=tmp_path / "out", max_difference=float("nan"))
    with pytest.raises(ConfigError, match="checked by the certificate; leave it on"):
        export(run_folder, output=tmp_path / "out", max_difference=1.0, certificate=False)
    with pytest.raises(ConfigError, match="native has one file of weights; max_shard_size is for"):
        export(run_folder, to="native", output=tmp_path / "out", max_shard_size="1GB")


def test_without_the_program_our_reader_reads_it_and_says_so(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = util.find_spec
    monkeypatch.setattr(
        "castalia.export.formats.find_spec",
        lambda name: None if name == "transformers" else found(name),
    )
    (done,) = export(run_folder, to="hf", output=tmp_path / "out", max_difference=1e-6)
    assert done.certificate["largest_difference"] == 0
    assert done.certificate["target"]["note"] == "transformers is not installed"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Read by Castalia itself: transformers is not installed." in card


def test_a_missing_engine_leaves_the_number_out_and_says_why(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ctranslate2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("castalia.inference.ct2_engine.Ct2Engine.is_installed", lambda: False)
    (done,) = export(run_folder, to="ct2", output=tmp_path / "out")
    assert done.certificate["unmeasured"] == "ct2 is not installed"
    assert done.certificate["largest_difference"] is None
    with pytest.raises(ConfigError, match="max_difference runs the export to measure it: pip"):
        export(run_folder, to="ct2", output=tmp_path / "other", max_difference=1.0)


def test_a_file_that_its_program_cannot_load_is_not_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise CheckpointError("a tensor has a wrong shape")

    monkeypatch.setattr(NativeEngine, "from_export", broken)
    with pytest.raises(CastaliaError, match=r"out was not written: .* cannot read it \(a tensor"):
        list(export(run_folder, to="native", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_beyond_the_memory_is_not_measured(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "available_bytes", lambda: 1000)
    (done,) = export(run_folder, output=tmp_path / "out")
    assert "GiB in fp32 and 0.0 GiB of memory are available" in done.certificate["unmeasured"]
    with pytest.raises(CastaliaError, match="not written: not measured: the model takes"):
        list(export(run_folder, output=tmp_path / "other", max_difference=1.0))


def test_it_can_be_left_out(run_folder: Path, tmp_path: Path) -> None:
    (done,) = export(run_folder, output=tmp_path / "out", certificate=False)
    assert done.certificate is None and not (tmp_path / "out" / "certificate.json").exists()


def test_a_program_that_computes_something_else_is_found(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the head too large, as a wrong layout would have it."""
    right = HuggingFace.write_shards

    def wrong(folder: Path, source: object, numbers: str, size: str) -> None:
        from safetensors.torch import load_file, save_file

        right(folder, source, numbers, size)
        tensors = load_file(folder / "model.safetensors")
        tensors["embed_out.weight"][100] *= 2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(HuggingFace, "write_shards", wrong)
    with pytest.raises(CastaliaError, match="was not written: the largest difference"):
        list(export(run_folder, output=tmp_path / "out", max_difference=1e-2))


def test_numbers_that_are_not_finite_are_never_small() -> None:
    one = torch.ones(2, 3)
    broken = one.clone()
    broken[1, 1] = torch.nan
    assert compared(one, broken)["largest_difference"] == float("inf")
    assert compared(broken, broken)["largest_difference"] == float("inf")
    assert compared(one, torch.ones(2, 2))["largest_difference"] == float("inf")
    assert compared(one, one + torch.eye(2, 3) / 4) == {
        "largest_difference": 0.25,
        "largest_logit": 1.0,
        "same_greedy": 0.5,
    }


def test_settings_of_generation_and_shards_come_through(run_folder: Path, tmp_path: Path) -> None:
    """A published folder's own generation settings go into its export, whose weights are shards."""
    list(export(run_folder, output=tmp_path / "one", certificate=False))
    (tmp_path / "one" / "export.json").unlink()  # published folders have none
    path = tmp_path / "one" / "generation_config.json"
    own = {"temperature": 0.6, "top_p": 0.9, "transformers_version": "4.31.0"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (done,) = export(
        tmp_path / "one", output=tmp_path / "two", max_shard_size="150KB", max_difference=1e-4
    )
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    assert {"model.safetensors"} == set(done.certificate["source"]["sha256"])
    assert torch.equal(load(tmp_path / "two").logits([1, 2]), load(run_folder).logits([1, 2]))


def test_an_import_is_compared_with_the_program_of_its_source(
    run_folder: Path, tmp_path: Path
) -> None:
    """transformers vouches for a Hugging Face folder, Castalia's reader for a GGUF file."""
    pytest.importorskip("transformers")
    list(export(run_folder, to="hf", output=tmp_path / "hf", certificate=False))
    done = import_model(tmp_path / "hf", tmp_path / "ours", max_difference=1e-4)
    found = written(tmp_path / "ours")
    assert found == done.certificate and 0 < found["largest_difference"] < 1e-4
    assert found["source"]["program"].startswith("transformers ")
    assert "engine=torch" in found["target"]["program"] and found["target"]["name"] == "ours"
    assert list(found["target"]["sha256"]) == ["manifest.json"]
    card = (tmp_path / "ours" / "README.md").read_text()
    assert f"{found['largest_difference']:.3g}" in card
    list(export(run_folder, to="gguf", quantization="F32", output=tmp_path / "g", force=True))
    done = import_model(tmp_path / "g" / "model.gguf", tmp_path / "again", max_difference=0.0)
    assert done.certificate["largest_difference"] == 0
    assert "engine=torch" in done.certificate["source"]["program"]
    plain = import_model(tmp_path / "hf", tmp_path / "plain", certificate=False)
    assert plain.certificate is None and not (tmp_path / "plain" / "certificate.json").exists()


def test_an_import_that_reads_the_config_wrongly_is_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    list(export(run_folder, to="hf", output=tmp_path / "hf", certificate=False))
    right = importing.open_model

    def wrong(path: Path, **options: object) -> SavedModel:
        source = right(path, **options)
        if Path(path).name != "hf":
            return source
        update = {"parallel_residual": not source.config.parallel_residual}
        return replace(source, config=source.config.model_copy(update=update))

    monkeypatch.setattr(importing, "open_model", wrong)
    with pytest.raises(CastaliaError, match=r"was not written: the largest difference .* is 0\.1"):
        import_model(tmp_path / "hf", tmp_path / "ours", max_difference=0.1)
    assert [item.name for item in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(ConfigError, match="max_difference must be >= 0"):
        import_model(tmp_path / "hf", tmp_path / "ours", max_difference=float("nan"))
