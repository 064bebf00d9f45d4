"""Files of an export: readable as the umask says, templates in folders, another form of GELU."""

import json
import os
import shutil
from pathlib import Path

import pytest

from castalia.core.errors import ConfigError
from castalia.core.files import files_in, sha256_of
from castalia.export import export


@pytest.fixture(scope="module")
def exact(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the exact GELU, as Pythia's are published, and two templates."""
    folder = tmp_path_factory.mktemp("exact") / "hf"
    list(export(run_folder, to="hf", output=folder))
    (folder / "export.json").unlink()  # published folders have none
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.mark.parametrize("to", ["hf", "native", "ct2"])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_is_readable_as_the_umask_says(
    exact: Path, tmp_path: Path, to: str, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        list(export(exact, to=to, output=tmp_path / "out"))
    finally:
        os.umask(before)
    files = files_in(tmp_path / "out")
    assert len(files) > 5
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == {
        file.name: mode for file in files
    }
    # A template of its own folder is exported and recorded like the others.
    template = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    name = "additional_chat_templates/tool_use.jinja"
    assert record["files_sha256"][name] == sha256_of(template)


def test_llama_cpp_gets_the_tanh_form_when_it_is_asked_for(exact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ConfigError,
        match=r"activation='gelu', only 'gelu_tanh'; --activation gelu_tanh exports .* 0.00048",
    ):
        list(export(exact, to="gguf", output=out))
    (done,) = export(exact, to="gguf", output=out, activation="gelu_tanh")
    (note,) = done.notes
    assert "activation=gelu of the checkpoint is computed as gelu_tanh" in note
    assert "at most 0.00048" in note and note in (out / "README.md").read_text()
    # The record says what the file computes, so its engine takes it.
    assert json.loads((out / "export.json").read_text())["model"]["activation"] == "gelu_tanh"
    plain = tmp_path / "plain"
    shutil.copytree(exact, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    (trained,) = export(plain, to="gguf", output=tmp_path / "trained", activation="gelu_tanh")
    assert trained.notes == []
    assert (tmp_path / "trained" / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()
    with pytest.raises(ConfigError, match="unknown activation 'relu'; choose one of gelu, gelu_"):
        export(exact, to="gguf", output=tmp_path / "no", activation="relu")


def test_the_effect_of_another_form_is_measured(exact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The naïve café owner said: “¡Olé!” and poured 🍵 for two.\n", "utf-8")
    (same,) = export(
        exact, to="native", quantization="fp32", output=tmp_path / "same", heldout=text
    )
    (other,) = export(
        exact,
        to="native",
        quantization="fp32",
        output=tmp_path / "other",
        heldout=text,
        activation="gelu_tanh",
    )
    assert same.quality is not None and other.quality is not None
    off = [abs(q["perplexity"] - q["perplexity_fp32"]) for q in (same.quality, other.quality)]
    assert 4 * off[0] < off[1] < 1e-3
