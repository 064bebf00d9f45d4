"""`castalia import`: the folder that it writes takes the place of a run; one sentence for each
mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from castalia.checkpoint import copying, verify
from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.export import export, import_model
from castalia.formats.saved_model import is_model_alone, open_model
from castalia.inference import load
from castalia.runs.config import RunConfig
from castalia.train.start import open_start

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def hugging_face(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in transformers' format, in halves, with a chat template and two ends."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    list(export(run_folder, to="hf", dtype="fp16", output=folder))
    (folder / "export.json").unlink()  # folders of others have none
    (folder / "generation_config.json").write_text('{"bos_token_id": 9, "eos_token_id": [256, 7]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def imported(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as `import` writes it, in many small files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "SHARD_BYTES", 40_000)
        import_model(hugging_face, folder)
    return folder


def test_it_is_the_source_bit_for_bit_with_its_tokenizer_and_ends(
    hugging_face: Path, imported: Path
) -> None:
    there = open_model(hugging_face)
    here = open_model(imported)
    assert sorted(here.tensors) == sorted(there.tensors)
    for name, tensor in there.tensors.items():
        assert here.tensors[name].equal(tensor) and here.tensors[name].dtype == torch.float16
    assert here.config == there.config and here.step == 0
    assert here.tokenizer is not None and there.tokenizer is not None
    assert here.tokenizer.text == there.tokenizer.text
    assert here.special == there.special and here.special.end_ids == (256, 7)
    assert (here.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert len(list(here.folder.glob("model-*.safetensors"))) > 3
    verify(here.folder)
    state = json.loads((here.folder / "state.json").read_text())
    assert state["imported"]["sha256"] == there.hashes()
    assert f"- `model.safetensors` `{there.hashes()['model.safetensors']}`" in (
        imported / "README.md"
    ).read_text().replace("SHA-256", "")


def test_every_verb_takes_it_for_a_run(
    hugging_face: Path, imported: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    prompt = "The na"
    assert load(imported).generate(prompt, max_new_tokens=8) == load(hugging_face).generate(
        prompt, max_new_tokens=8
    )
    assert command("generate", imported, "--prompt", prompt, "--max-new-tokens", "4")[0] == 0
    again = tmp_path / "again"
    code, _, err = command("export", imported, "--to", "hf", "--dtype", "fp16", "--output", again)
    assert code == 0, err
    first = load_file(hugging_face / "model.safetensors")
    second = load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    config = json.loads((again / "config.json").read_text())
    assert config == json.loads((hugging_face / "config.json").read_text()) | {
        "bos_token_id": 9,
        "eos_token_id": [256, 7],
    }
    model = open_model(imported).config.model_dump() | {"start": str(imported)}
    run = RunConfig(output=str(tmp_path / "run"), model=model, data={"seq_length": 16})
    start = open_start(run, ALONE)
    assert start is not None and not start.drawn
    run = RunConfig(
        output=str(tmp_path / "run"),
        model=model,
        data={"seq_length": 16},
        train={"start_step": True},
    )
    with pytest.raises(ConfigError, match="holds weights only, not a checkpoint"):
        open_start(run, ALONE)


def test_the_command_prints_one_line_and_replaces_only_imports(
    hugging_face: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    place = tmp_path / "model"
    words = ("import", hugging_face, "--output", place)
    code, out, err = command(*words, "--dtype", "bf16", "--json")
    record = json.loads(out)
    assert code == 0 and (record["dtype"], record["tensors"], record["notes"]) == ("bf16", 28, [])
    assert open_model(place).tensors["embed.weight"].dtype == torch.bfloat16
    code, out, err = command(*words)
    assert code == 2 and "exists already; use --force" in err and err.count("\n") == 1
    code, out, err = command(*words, "--force")
    assert code == 0 and out.startswith(f"{place}  neox fp16  step 0  ")
    # Of transformers over the source, and of what was written.
    certificate = json.loads((place / "certificate.json").read_text())
    assert certificate["source"]["program"].startswith("transformers ")
    assert certificate["largest_difference"] < 1e-4 < certificate["largest_logit"]
    assert "## Certificate" in (place / "README.md").read_text()
    code, out, err = command(*words, "--force", "--dtype", "bf16", "--max-difference", "1e-6")
    assert code == 1 and "was not written: the largest difference" in err
    assert open_model(place).tensors["embed.weight"].dtype == torch.float16
    (place / "notes.txt").write_text("mine")
    (place / "checkpoints" / "step-00000009").mkdir()
    code, out, err = command(*words, "--force")
    assert code == 2 and "holds checkpoints/step-00000009, notes.txt, which its import did" in err
    assert (place / "notes.txt").is_file() and err.count("\n") == 1
    (place / "import.json").unlink()
    code, out, err = command(*words, "--force")
    assert code == 2 and "is not an import" in err
    bare = shutil.copytree(hugging_face, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    code, out, err = command("import", bare, "--output", tmp_path / "ids")
    assert code == 0 and "note: " in err and "--tokenizer FILE" in err
    code, out, err = command("import", bare, "--output", tmp_path / "t", "--tokenizer", "bytes")
    assert code == 0 and load(tmp_path / "t").encode("a") == [97]


def test_mistakes_are_one_sentence_and_leave_nothing(
    hugging_face: Path,
    run_folder: Path,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    place = tmp_path / "out" / "model"
    broken = shutil.copytree(hugging_face, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["gpt_neox.embed_in.weight"]
    save_file(weights, broken / "model.safetensors")
    for path, more, message in (
        (tmp_path / "none", (), "does not exist"),
        (run_folder, (), "a Castalia run needs no import"),
        (tmp_path, (), "is no model that can be imported"),
        (broken, (), "keys that are missing"),
        (hugging_face, ("--dtype", "fp8"), "unknown dtype 'fp8'"),
        (hugging_face, ("--config", "none.yml"), "--config names files of GPT-NeoX"),
    ):
        code, _, err = command("import", path, "--output", place, *more)
        assert code != 0 and message in err and err.count("\n") == 1, err
    assert not place.exists() and not list(place.parent.glob(".*"))


def test_the_folder_may_be_the_one_that_one_is_in_and_hold_other_files(
    hugging_face: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    import_model(hugging_face, ".", certificate=False)
    monkeypatch.chdir(tmp_path)
    # A file of another program hides neither the import nor one of its steps.
    for folder in (place, open_model(place).folder):
        (folder / "model.gguf").write_bytes(b"GGUF")
        assert open_model(folder).is_checkpoint and not is_model_alone(folder)
    export_place = tmp_path / "there"
    export_place.mkdir()
    monkeypatch.chdir(export_place)
    list(export(run_folder, to="hf", output=".", certificate=False))
    monkeypatch.chdir(tmp_path)
    assert (export_place / "config.json").is_file()
