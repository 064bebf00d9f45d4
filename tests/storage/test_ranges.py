"""Token files in a bucket, of which only the ranges that rows need are read."""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import DataError
from castalia.data import IndexedDataset, IndexedDatasetWriter, fingerprint
from castalia.data.sidecar import close_with_record, read_record
from castalia.data.sources import open_files
from castalia.recipes import load_config
from castalia.storage import ObjectStore, StorageError, ranged, twins
from castalia.storage.ranged import BLOCK_BYTES, runs_of
from castalia.train.run import run

DOCUMENTS = 6000


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Prefix of a token file of 6 MB, with its record."""
    prefix = tmp_path_factory.mktemp("tokens") / "text"
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, "uint16")
    for size in random.integers(20, 1000, DOCUMENTS):
        writer.add(random.integers(97, 123, size))
    close_with_record(writer, str(prefix), {})
    return prefix


@pytest.fixture
def remote(link, new_bucket, local, tmp_path, monkeypatch):
    """URL of its copy in a bucket; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(twins, "TWINS", {})
    bucket = new_bucket()
    store = ObjectStore(f"{bucket}/data")
    for suffix in (".bin", ".idx", ".json"):
        store.write(f"text{suffix}", Path(f"{local}{suffix}").read_bytes())
    return f"{bucket}/data/text"


def test_rows_are_those_of_the_file_and_few_bytes_are_read(link, remote, local, monkeypatch):
    whole = IndexedDataset(local)
    small = Path(f"{local}.idx").stat().st_size
    before = link.received
    dataset = IndexedDataset(remote)
    chosen = np.random.default_rng(1).integers(0, DOCUMENTS, 4).tolist()
    for number in chosen:
        dataset.fetch(number, 0, int(dataset.sizes[number]))
    for number in chosen:
        assert np.array_equal(dataset[number], whole[number])
    received = link.received - before - small
    # At most two blocks for each document, and the heads of some answers.
    assert received < 8 * BLOCK_BYTES + 20_000 < len(whole.buffer) / 5
    # Another process finds the blocks on the disk.
    before = link.received
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[number].tolist() for number in chosen] == [
        whole[number].tolist() for number in chosen
    ]
    assert link.received - before < 5000
    # Of a large file the fingerprint samples 64 blocks, and is that of the local file.
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 1 << 16)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(fingerprint, "BLOCKS", 4)
    assert fingerprint.contents(dataset) == fingerprint.contents(whole)
    assert sum(1 for _ in Path(dataset.prefix + ".blocks").glob("*/*")) < 16
    assert read_record(remote) == read_record(local)
    assert dataset.buffer[10:2_000_000] == whole.buffer[10:2_000_000]


def test_a_run_reads_the_same_rows(remote, local, tmp_path, link, capsys):
    numbers = []
    prints = []
    runs = (("here", local, 0), ("there", remote, 0), ("workers", remote, 2))
    for name, prefix, workers in runs:
        words = ["debug", "model.num_layers=1", "model.hidden_size=32", "data.seq_length=16"]
        words += ["train.batch_size=4", "train.steps=3", "checkpoint.steps=[]"]
        words += [f"data.train={prefix}", f"output={tmp_path / name}", f"data.workers={workers}"]
        run(load_config(words), ["castalia", "train", *words])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        numbers.append(
            [(json.loads(line)["rows_hash"], json.loads(line)["loss"]) for line in lines]
        )
        state = tmp_path / name / "checkpoints/step-00000003/state.json"
        prints.append(json.loads(state.read_text())["data"])
    assert numbers[0] == numbers[1] == numbers[2] and prints[0] == prints[1] == prints[2]
    # The config keeps the URL, so that another machine reads the same.
    assert remote in (tmp_path / "there" / "config.yaml").read_text()


def test_an_object_that_was_changed_is_an_error(remote, monkeypatch):
    dataset = IndexedDataset(remote)
    parent, _, name = remote.rpartition("/")
    store = ObjectStore(parent)
    content = bytearray(store.read(f"{name}.bin"))
    content[5] ^= 1
    store.write(f"{name}.bin", bytes(content))
    # While it is read: noticed before more of it is fetched.
    monkeypatch.setattr(ranged, "CHECK_SECONDS", 0.0)
    with pytest.raises(StorageError, match=r"text\.bin was changed since .*its tag was"):
        dataset[DOCUMENTS - 1]
    # And by the next run.
    monkeypatch.setattr(twins, "TWINS", {})
    with pytest.raises(DataError, match=r"text\.bin was changed since .*restore it, or delete"):
        IndexedDataset(remote)
    store.delete([f"{name}.idx"])
    with pytest.raises(DataError, match=r"text\.idx: it does not exist; a token file is a pair"):
        IndexedDataset(remote)


def test_blocks_of_a_changed_object_do_not_outlive_it(remote, local, monkeypatch):
    parent, _, name = remote.rpartition("/")
    store = ObjectStore(parent)
    content = Path(f"{local}.bin").read_bytes()
    dataset = IndexedDataset(remote)
    # Its size is the same, and the comparison of before is still good.
    store.write(f"{name}.bin", bytes(len(content)))
    assert dataset.buffer[:100] == bytes(100)
    monkeypatch.setattr(twins, "TWINS", {})
    with pytest.raises(DataError, match="was changed since"):
        IndexedDataset(remote)
    store.write(f"{name}.bin", content)
    assert IndexedDataset(remote).buffer[:100] == content[:100]


def test_blocks_that_nobody_reads_are_not_kept_in_memory(remote, local):
    buffer = IndexedDataset(remote).buffer
    buffer.fetch(0, 40 * BLOCK_BYTES)
    buffer.pool.shutdown(wait=True)
    assert not buffer.coming
    assert buffer[: 30 * BLOCK_BYTES] == Path(f"{local}.bin").read_bytes()[: 30 * BLOCK_BYTES]


def test_the_cache_is_bounded_and_mends_itself(remote, local, tmp_path, link):
    folder = tmp_path / "blocks"
    words = ["debug", f"data.train={remote}", f"data.cache={folder}", "data.cache_gib=0.001"]
    dataset = open_files(load_config(words).data)[0].tokens[0]
    twins.use_cache(None, None)
    assert Path(dataset.prefix).is_relative_to(folder)
    content = Path(f"{local}.bin").read_bytes()
    # What another process is writing is left alone, but not what one left when it was killed.
    places = Path(dataset.prefix + ".blocks") / "0000"
    places.mkdir(parents=True, exist_ok=True)
    written, left = places / ".00000009.a.tmp", places / ".00000008.b.tmp"
    for path, age in ((written, 60), (left, 7200)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    step = 3 * BLOCK_BYTES
    for start in range(0, len(content), step):
        assert dataset.buffer[start : start + step] == content[start : start + step]
    assert written.exists() and not left.exists()
    written.unlink()
    blocks = list(Path(dataset.prefix + ".blocks").glob("*/*"))
    assert 0 < sum(path.stat().st_size for path in blocks) < 2.5 * (1 << 20)
    # What a power cut or a bad disk left is fetched again.
    for path in blocks:
        path.write_bytes(b"\0" * path.stat().st_size)
    again = IndexedDataset(dataset.prefix)
    assert again.buffer[:] == content


def test_a_server_that_comes_back_and_one_that_does_not(remote, link, monkeypatch):
    dataset = IndexedDataset(remote)
    buffer = dataset.buffer
    assert isinstance(buffer, ranged.RangedFile)
    buffer.store.transfer = buffer.store.transfer._replace(retries=1)
    link.set("gone")
    try:
        with pytest.raises(StorageError, match="the server does not answer"):
            buffer[:10]
    finally:
        link.set("open")
    assert len(buffer[:10]) == 10


def test_requests_are_whole_runs():
    assert [list(run) for run in runs_of([1, 2, 3, 7, 8, 20])] == [[1, 2, 3], [7, 8], [20]]
    most = ranged.REQUEST_BYTES // BLOCK_BYTES
    assert [len(run) for run in runs_of(range(most + 1))] == [most, 1]
