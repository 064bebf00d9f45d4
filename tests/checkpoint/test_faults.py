"""Flipped bits, truncated and hostile files, full disks: refused by name, and the checkpoint
before is found."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import threading

import pytest
import torch

from castalia.checkpoint import (
    DamagedCheckpointError,
    Store,
    load_into,
    read,
    read_config,
    read_state,
    verify,
)
from castalia.checkpoint import save as save_module
from castalia.core.errors import CheckpointError
from castalia.core.hashed_file import HashedFile

FILES = ["COMPLETE", "manifest.json", "state.json", "config.yaml", "tokenizer.json"]
SHARDS = ["model-00000.safetensors", "optim-00000.safetensors"]


def values(step):
    generator = torch.Generator().manual_seed(step)
    names = ["model.a", "model.b", "optim.exp_avg.a"]
    return {name: torch.randn(6, 4, generator=generator) for name in names}


def blank():
    return {name: torch.zeros(6, 4) for name in values(0)}


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints")
    for step in (1, 2):
        files = {"config.yaml": "seed: 1\n", "tokenizer.json": "{}"}
        store.save(step, values(step), {"step": step}, files, asynchronous=False)
    return store


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES + SHARDS)
def test_any_flipped_bit_is_found_and_named(store, name):
    path = store.folder_of(2) / name
    good = path.read_bytes()
    bits = range(len(good) * 8)
    if len(bits) > 120:
        bits = [0, 7, bits[-1], bits[-8], *random.Random(5).sample(bits, 116)]
    for bit in bits:
        flip(path, bit)
        named = (
            "manifest.json does not have the hash in COMPLETE"
            if name in ("COMPLETE", "manifest.json")
            else name
        )
        with pytest.raises(DamagedCheckpointError, match=named):
            verify(store.folder_of(2))
        path.write_bytes(good)
    assert verify(store.folder_of(2)) == []


@pytest.mark.parametrize("name", FILES + SHARDS)
@pytest.mark.parametrize("damage", ["one byte less", "empty", "one byte more", "missing"])
def test_any_truncated_file_is_found_and_named(store, name, damage):
    folder = store.folder_of(2)
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"one byte less": data[:-1], "empty": b"", "one byte more": data + b" "}[damage]
        )
    with pytest.raises(DamagedCheckpointError, match=name):
        verify(folder)


@pytest.mark.parametrize("name", FILES + SHARDS)
def test_the_previous_good_checkpoint_is_found(store, name):
    flip(store.folder_of(2) / name, 11)
    target = blank()
    with pytest.warns(UserWarning, match=rf"{name}.*skipping the checkpoint of step 2"):
        assert store.load_latest(target) == (1, {"step": 1})
    assert equal(target, values(1))
    assert len(store.warnings) == 1 and name in store.warnings[0]
    target = blank()
    with pytest.raises(DamagedCheckpointError, match=name):
        store.load(2, target)
    assert not any(tensor.any() for tensor in target.values())


def test_reading_parts_checks_what_it_reads(store):
    folder = store.folder_of(2)
    flip(folder / "model-00000.safetensors", 8 * 200)
    with pytest.raises(DamagedCheckpointError, match=r"model-00000"):
        read(folder)
    assert torch.equal(read(folder, prefix="optim.exp_avg.")["a"], values(2)["optim.exp_avg.a"])
    flip(folder / "state.json", 3)
    flip(folder / "config.yaml", 3)
    with pytest.raises(DamagedCheckpointError, match=r"state\.json"):
        read_state(folder)
    with pytest.raises(DamagedCheckpointError, match=r"config\.yaml"):
        read_config(folder)


def test_no_good_checkpoint_is_an_error_that_names_the_files(store):
    flip(store.folder_of(1) / "state.json", 0)
    flip(store.folder_of(2) / "model-00000.safetensors", 999)
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=r"(?s)steps 1, 2.*model-00000.*state\.json"),
    ):
        store.load_latest(blank())


def test_unfinished_saves_are_passed_over_with_a_word(store):
    (store.folder_of(2) / "COMPLETE").unlink()
    (store.folder / ".step-00000003.tmp").mkdir()
    with pytest.warns(UserWarning, match=r"left over from an unfinished save"):
        assert store.load_latest(blank()) == (1, {"step": 1})
    assert [line.split("/")[-1].split()[0] for line in store.warnings] == [
        ".step-00000003.tmp",
        "step-00000002",
    ]


def test_what_a_killed_deletion_left_goes_at_the_next_start(store):
    left = store.folder / ".trash-step-00000000-1"
    shutil.copytree(store.folder_of(1), left)
    with store.writing():
        store.load_latest(blank())
        assert left.exists()
    assert store.load_latest(blank()) == (2, {"step": 2})
    assert not left.exists()


def test_a_copied_folder_is_not_another_step(store):
    shutil.copytree(store.folder_of(1), store.folder / "step-00000009")
    with pytest.raises(
        DamagedCheckpointError, match=r"it is of step 1, in a folder named step-00000009"
    ):
        verify(store.folder / "step-00000009")
    shutil.copytree(store.folder_of(1), store.folder / "best")
    assert verify(store.folder / "best") == []


def test_files_that_are_not_listed_are_named(store):
    (store.folder_of(2) / "notes.txt").write_text("mine")
    assert verify(store.folder_of(2)) == ["notes.txt"]


def rewrite(folder, change):
    """Change the manifest as a forger would, who can make COMPLETE agree."""
    table = json.loads((folder / "manifest.json").read_text())
    change(table)
    text = json.dumps(table).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest() + "\n")


def rename_file(table, name):
    table["files"][name] = table["files"].pop(SHARDS[0])
    for tensor in ("model.a", "model.b"):
        table["tensors"][tensor]["chunks"][0]["file"] = name


def set_in(*path, value):
    def change(table):
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return change


FORGERIES = [
    (lambda table: rename_file(table, "../../outside.safetensors"), "not a valid file name"),
    (lambda table: rename_file(table, "/etc/passwd"), "not a valid file name"),
    (lambda table: rename_file(table, "COMPLETE"), "not a valid file name"),
    (lambda table: rename_file(table, "absent.safetensors"), "absent.safetensors is missing"),
    (lambda table: rename_file(table, "link.safetensors"), "is a symbolic link"),
    (lambda table: rename_file(table, "pipe.safetensors"), "is not a plain file"),
    (lambda table: table["files"].pop(SHARDS[0]), "is not listed"),
    (lambda table: table["files"].pop("state.json"), "lists no state.json"),
    (set_in("files", SHARDS[0], "size", value=-1), "malformed at files"),
    (set_in("tensors", "model.a", "shape", value=[6, 1 << 60]), "elements, expected"),
    (set_in("tensors", "model.a", "shape", value=[float("nan"), 4]), "malformed at tensors"),
    (set_in("tensors", "model.a", "dtype", value="object"), "unknown dtype"),
    (set_in("tensors", "model.a", "dtype", value="int32"), "model.a has another shape or dtype"),
    (set_in("tensors", "model.a", "chunks", value=[]), "0 elements, expected 24"),
    (
        set_in("tensors", "model.a", "chunks", 0, "key", value="model.z"),
        "model-00000.safetensors is corrupt",
    ),
    (set_in("step", value=3), "it is of step 3"),
    (set_in("surprise", value=1), "malformed at surprise"),
    (set_in("format", value=2), "format 2, this Castalia reads 1"),
]


@pytest.mark.parametrize("change, message", FORGERIES)
def test_forged_manifests_are_refused(store, change, message):
    folder = store.folder_of(2)
    (folder / "link.safetensors").symlink_to(folder / SHARDS[0])
    os.mkfifo(folder / "pipe.safetensors")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        verify(folder)
    target = blank()
    with pytest.raises(CheckpointError):
        load_into(folder, target)
    assert not any(tensor.any() for tensor in target.values())


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"null"]
)
def test_manifests_that_are_no_manifests(store, text):
    folder = store.folder_of(2)
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match=r"manifest.json|checkpoint format"):
        verify(folder)


def fill_shard(folder, data):
    """Put other bytes in a shard and make the hashes agree."""
    (folder / SHARDS[0]).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, set_in("files", SHARDS[0], value=entry))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,  # a header of 2^64 bytes
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b'{"a": 1}',
    ],
)
def test_forged_shards_are_refused_before_anything_is_changed(store, data):
    fill_shard(store.folder_of(2), data)
    target = blank()
    with pytest.raises(DamagedCheckpointError, match=r"model-00000"):
        load_into(store.folder_of(2), target)
    assert not any(tensor.any() for tensor in target.values())


@pytest.mark.parametrize("nth", range(8))
def test_a_disk_that_fills_at_any_write(tmp_path, store, monkeypatch, nth):
    write, count = HashedFile.write, iter(range(1000))

    def fills(self, data):
        if next(count) >= nth:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "write", fills)
        store.save(3, values(3), {"step": 3})
        with pytest.raises(
            CheckpointError,
            match=r"cannot save step 3 .*No space left.*needs 288 B.*earlier .* intact",
        ):
            store.wait()
    store.wait()  # the failure is told once
    assert {item.name for item in store.folder.iterdir()} == {
        "step-00000001",
        "step-00000002",
        ".lock",
    }
    target = blank()
    assert store.load_latest(target) == (2, {"step": 2})
    assert equal(target, values(2))
    store.save(3, values(3), {"step": 3}, asynchronous=False)
    assert store.load_latest(target) == (3, {"step": 3})


def test_a_failure_is_raised_at_the_next_save(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(save_module, "write_shard", lambda path, content: 1 // 0)
        store.save(3, values(3), {})
        with pytest.raises(CheckpointError, match=r"cannot save step 3 .*ZeroDivisionError"):
            store.save(4, values(4), {})
    assert store.steps() == [1, 2]


def test_a_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        store = Store(mount / "checkpoints")
        store.save(1, {"model.a": torch.ones(250_000)}, {}, asynchronous=False)
        with pytest.raises(
            CheckpointError, match=r"No space left on device .rank 0 needs 1.1[0-9] MiB"
        ):
            store.save(2, {"model.a": torch.ones(300_000)}, {}, asynchronous=False)
        assert {item.name for item in store.folder.iterdir()} == {"step-00000001", ".lock"}
        assert verify(store.folder_of(1)) == []
        store.save(2, {"model.a": torch.ones(200_000)}, {}, asynchronous=False)
        assert store.steps() == [1, 2]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot save step 1 in .*Not a directory"):
        Store(tmp_path / "file" / "checkpoints").save(1, values(1), {}, asynchronous=False)


def test_two_runs_do_not_save_in_one_folder_at_once(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = HashedFile.write
    monkeypatch.setattr(
        HashedFile, "write", lambda self, data: may_write.wait(120) and write(self, data)
    )
    first, second = Store(tmp_path), Store(tmp_path, patience=0.1)
    first.save(1, values(1), {})
    try:
        while not (tmp_path / ".step-00000001.tmp").exists():
            pass
        with pytest.raises(CheckpointError, match=r"another run is saving"):
            second.save(2, values(2), {}, asynchronous=False)
    finally:
        may_write.set()
    first.wait()
    assert first.steps() == [1]
    second.save(2, values(2), {}, asynchronous=False)
    assert first.steps() == [1, 2]
