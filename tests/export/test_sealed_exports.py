"""Exports are compared with the hashes in their records when they are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from castalia.cli.app import app
from castalia.core.errors import CheckpointError
from castalia.core.files import files_in
from castalia.core.sealed import record_text, with_own_hash
from castalia.export import export, import_model
from castalia.formats.export_record import UNREAD, check_export, read_record
from castalia.inference import load
from castalia.integrity import check_folders

KINDS = {
    "hf": {"max_shard_size": "150KB"},
    "native": {},
    "ct2": {},
    "gguf": {"quantization": "F16"},
    "neox": {},
}


@pytest.fixture(scope="module")
def exports(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export to each format, as folders of one folder."""
    folder = tmp_path_factory.mktemp("exports")
    for to, options in KINDS.items():
        list(export(run_folder, to=to, output=folder / to, certificate=False, **options))
    return folder


def flip(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(flip(file.read_bytes())), "its SHA-256 is"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, expected"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("to", KINDS)
def test_a_change_of_any_file_is_an_error(
    exports: Path, to: str, change: Callable[[Path], object], message: str
) -> None:
    folder = exports / to
    for file in files_in(folder):
        if file.name in (*UNREAD, "export.json"):
            continue
        data = file.read_bytes()
        change(file)
        with pytest.raises(CheckpointError, match=f"{file.name} .*{message}.*export it again from"):
            check_export(folder)
        file.write_bytes(data)
    check_export(folder)
    # The whole way: the largest file is of weights.
    weights = max(files_in(folder), key=lambda file: file.stat().st_size)
    data = weights.read_bytes()
    change(weights)
    with pytest.raises(CheckpointError, match=f"{weights.name} .*{message}"):
        load(folder)
    weights.write_bytes(data)
    # A file of floats is read by every engine; its own needs a package that may be missing.
    engine = "torch" if to == "gguf" else "auto"
    whole = load(folder, engine=engine)
    assert whole.config.num_layers == load(folder, engine=engine, verify=False).config.num_layers


def test_any_change_of_a_record_is_an_error(exports: Path, tmp_path: Path) -> None:
    good = (exports / "native" / "export.json").read_bytes()
    for place in range(0, len(good), 17):
        changed = bytearray(good)
        changed[place] ^= 1 << place % 8
        (tmp_path / "export.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"export\.json is (damaged|not the record)"):
            read_record(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "folder/../../outside"])
def test_a_record_names_files_of_its_folder_alone(exports: Path, tmp_path: Path, name: str) -> None:
    record = read_record(exports / "native")
    record["files_sha256"][name] = "0" * 64
    (tmp_path / "export.json").write_text(record_text(with_own_hash(record)))
    with pytest.raises(CheckpointError, match="is not the record of an export"):
        check_export(tmp_path)


@pytest.fixture
def hf(exports: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exports / "hf", tmp_path / "hf")


def test_an_older_record_covers_what_it_did(hf: Path) -> None:
    record = json.loads((hf / "export.json").read_text())
    for key in ("record_sha256", "files_bytes"):
        del record[key]
    (hf / "export.json").write_text(json.dumps(record))
    load(hf)
    (folder,) = check_folders([hf])
    assert [Path(file.path).name for file in folder.uncovered] == ["export.json"]
    (hf / "config.json").write_text((hf / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json .* SHA-256"):
        load(hf)
    # Without any record it is a folder like others.
    (hf / "export.json").unlink()
    load(hf)


def test_weights_beside_the_recorded_ones_are_not_taken_for_them(hf: Path) -> None:
    shutil.copy(next(hf.glob("model-*")), hf / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a file of this export"):
        load(hf)


def test_what_verify_says_of_other_files(hf: Path) -> None:
    (hf / ".gitattributes").write_text("*.safetensors filter=lfs")
    (hf / "notes.txt").write_text("mine")
    (hf / "README.md").write_text("# My model")
    load(hf)
    (folder,) = check_folders([hf])
    assert [Path(file.path).name for file in folder.uncovered] == ["notes.txt"]
    (wrong,) = folder.damaged
    assert wrong.path == str(hf / "README.md")


def test_links_to_a_cache_are_followed(hf: Path, tmp_path: Path) -> None:
    """As the cache of the hub has them."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in files_in(hf):
        (linked / file.name).symlink_to(file)
    assert torch.equal(load(linked).logits([1, 2]), load(hf).logits([1, 2]))


def test_no_verify_loads_what_is_damaged(hf: Path) -> None:
    card = hf / "tokenizer_config.json"
    card.write_text(card.read_text() + " ")
    words = ["generate", str(hf), "--prompt", "a", "--max-new-tokens", "1"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, CheckpointError)
    assert "or load it as it is with --no-verify" in str(result.exception)
    result = CliRunner().invoke(app, [*words, "--no-verify"])
    assert result.exit_code == 0, result.exception


def test_an_import_has_hashes_of_its_own_files(exports: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    import_model(exports / "hf", imported, certificate=False)
    folders = list(check_folders([imported]))
    assert [folder.kind for folder in folders] == ["import", "checkpoint"]
    assert not any(folder.damaged or folder.uncovered for folder in folders)
    record = imported / "import.json"
    record.write_text(record.read_text().replace('"step": ', '"step": 1'))
    (wrong,) = next(check_folders([imported])).damaged
    assert f"import it again from {exports / 'hf'}" in str(wrong.fault)
