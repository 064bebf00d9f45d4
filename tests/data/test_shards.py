"""Shards read in place, cut and joined to the same bytes; every fault is reported."""

import hashlib
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.curate.resharding import shard, unshard
from castalia.data import (
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    build_rows,
    check_vocab,
)
from castalia.data import shards as shard_module
from castalia.data.fingerprint import contents
from castalia.data.shards import base_of, find_shards, shard_name
from castalia.data.sidecar import close_with_record

SIZES = [5, 0, 1, 40, 3, 200, 7, 7]
"""263 tokens of 2 bytes: most 101-byte shards cut a document, every other one a token."""


@pytest.fixture
def cut(token_file, tmp_path):
    """cut(size): the whole file's prefix and its shards' prefix."""
    whole = token_file("whole/base", SIZES)

    def make(size):
        shard(whole, tmp_path / f"by{size}", size=size)
        return whole, str(tmp_path / f"by{size}" / "base")

    return make


@pytest.mark.parametrize("size", [3, 64, 101, 263, 526, 5000])
def test_in_place_is_the_whole_file(cut, size):
    whole, parts = (IndexedDataset(prefix) for prefix in cut(size))
    assert len(parts.shards) == -(-526 // size) and not whole.shards
    for i in range(len(SIZES)):
        assert parts[i].tolist() == whole[i].tolist()
        assert parts[i].dtype == whole.dtype and not (SIZES[i] and parts[i].flags.writeable)
        for offset in range(0, SIZES[i], 7):
            assert (
                parts.get(i, offset, min(9, SIZES[i] - offset)).tolist()
                == whole[i][offset : offset + 9].tolist()
            )
    assert contents(parts) == contents(whole)
    assert pickle.loads(pickle.dumps(parts))[5].tolist() == whole[5].tolist()


def test_names_are_those_of_pythia(cut, tmp_path):
    cut(100)
    names = [f"base-0000{i}-of-00005.bin" for i in range(6)]
    assert sorted(os.listdir(tmp_path / "by100")) == sorted([*names, "base.idx"])
    assert [(tmp_path / "by100" / name).stat().st_size for name in names] == [100] * 5 + [26]
    assert shard_name("document", 20, 20) == "document-00020-of-00020.bin"
    assert (
        base_of("d/pile_0.87_deduped_text_document-00000-of-00082.bin")
        == "d/pile_0.87_deduped_text_document"
    )
    assert base_of("plain.bin") == "plain.bin"


def test_a_shards_name_stands_for_the_prefix(cut):
    whole, parts = cut(100)
    for name in (parts, parts + ".idx", parts + "-00003-of-00005.bin", parts + "-00000-of-00005"):
        assert IndexedDataset(name)[5].tolist() == IndexedDataset(whole)[5].tolist()


def test_an_exact_multiple_with_pythias_empty_last_shard(cut, tmp_path):
    _, parts = cut(263)
    for i in range(2):
        os.rename(f"{parts}-0000{i}-of-00001.bin", f"{parts}-0000{i}-of-00002.bin")
    open(f"{parts}-00002-of-00002.bin", "wb").close()
    assert IndexedDataset(parts)[5].tolist() == list(range(49, 249))
    assert unshard(parts, tmp_path / "out").bytes == 526


def test_rows_of_a_run_are_the_same(cut):
    served = []
    for prefix in cut(101):
        config = DataConfig(train=[prefix], seq_length=8)
        rows = build_rows(config, seed=3, batch_size=4, steps=6, eval_every=None, eval_batches=1)
        served.append((np.stack([rows.train[i][0] for i in range(24)]), rows.fingerprint))
    assert np.array_equal(served[0][0], served[1][0]) and served[0][1] == served[1][1]


def test_ids_beyond_the_vocabulary_are_found_in_shards(cut):
    _, parts = cut(101)
    check_vocab(IndexedDataset(parts), 263)
    with pytest.raises(DataError, match=r"document 7 has token id 260, .* 260 ids"):
        check_vocab(IndexedDataset(parts), 260)


def remove(parts):
    os.remove(f"{parts}-00002-of-00005.bin")


def cut_off(parts):
    os.truncate(f"{parts}-00002-of-00005.bin", 99)


def cut_off_first(parts):
    os.truncate(f"{parts}-00000-of-00005.bin", 90)


def cut_off_last(parts):
    os.truncate(f"{parts}-00005-of-00005.bin", 20)


def second_set(parts):
    open(f"{parts}-00000-of-00009.bin", "wb").close()


FAULTS = {
    remove: r"base: 1 of 6 shards are missing: base-00002-of-00005\.bin",
    cut_off: r"base-00002-of-00005\.bin: 99 bytes, but base-00000-of-00005\.bin has 100",
    cut_off_first: r"base-00001-of-00005\.bin: 100 bytes, but base-00000-of-00005\.bin has 90",
    cut_off_last: r"base\.bin: 520 bytes, but .*base\.idx places document 7",
    second_set: r"found several sets of shards \(-of-00005 and -of-00009\)",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_goes_unseen(cut, tmp_path, fault):
    _, parts = cut(100)
    fault(parts)
    for use in (lambda: IndexedDataset(parts), lambda: unshard(parts, tmp_path / "out")):
        with pytest.raises(DataError, match=FAULTS[fault]):
            use()
    assert not (tmp_path / "out").exists()


def test_shards_longer_than_the_index(cut, tmp_path):
    _, parts = cut(100)
    with open(f"{parts}-00005-of-00005.bin", "ab") as last:
        last.write(b"xx")
    with pytest.raises(
        DataError,
        match=r"the shards have 528 bytes, but the documents of the \.idx end at byte 526",
    ):
        unshard(parts, tmp_path / "out")


@pytest.mark.parametrize("size", [3, 101, 526])
def test_joined_again(cut, tmp_path, size):
    whole, parts = cut(size)
    done = unshard(parts, tmp_path / "out")
    data = Path(whole + ".bin").read_bytes()
    assert (tmp_path / "out" / "base.bin").read_bytes() == data
    assert (tmp_path / "out" / "base.idx").read_bytes() == Path(whole + ".idx").read_bytes()
    assert (done.bytes, done.kept, done.sha256) == (526, 0, hashlib.sha256(data).hexdigest())
    assert sorted(os.listdir(tmp_path / "out")) == ["base.bin", "base.idx"]


def test_a_finished_join_is_compared_and_never_replaced(cut):
    _, parts = cut(100)
    assert unshard(parts).kept == 0
    again = unshard(parts)
    assert (again.kept, again.bytes) == (526, 526)
    with open(parts + ".bin", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(
        ConfigError, match=r"base\.bin exists and holds other bytes than the shards"
    ):
        unshard(parts)
    assert Path(parts + ".bin").read_bytes()[:1] == b"\xff"


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_interrupted_join_goes_on(cut, tmp_path, stop_at):
    whole, parts = cut(100)
    calls = []

    def power_cut(count):
        calls.append(count)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unshard(parts, tmp_path / "out", on_bytes=power_cut)
    assert os.listdir(tmp_path / "out") == [".base.bin.partial"]
    with open(
        tmp_path / "out" / ".base.bin.partial", "r+b"
    ) as file:  # a piece that the crash left wrong
        file.write(b"\xee\xee")
    done = unshard(parts, tmp_path / "out")
    assert (tmp_path / "out" / "base.bin").read_bytes() == Path(whole + ".bin").read_bytes()
    assert done.kept == sum(calls) - 100


KILLED = """
import os, signal, sys
from castalia.curate.resharding import unshard
left = [int(sys.argv[3])]
def count(size):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
unshard(sys.argv[1], sys.argv[2], on_bytes=count)
"""


def test_killed_joins_end_with_the_same_bytes(cut, tmp_path):
    whole, parts = cut(100)
    for calls in (1, 4, 6):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, parts, str(tmp_path / "out"), str(calls)]
        )
        assert done.returncode == -9 and not (tmp_path / "out" / "base.bin").exists()
    unshard(parts, tmp_path / "out")
    assert (tmp_path / "out" / "base.bin").read_bytes() == Path(whole + ".bin").read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == ["base.bin", "base.idx"]


def test_a_partial_file_longer_than_the_shards(cut, tmp_path):
    whole, parts = cut(100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".base.bin.partial").write_bytes(b"x" * 1000)
    unshard(parts, tmp_path / "out")
    assert (tmp_path / "out" / "base.bin").read_bytes() == Path(whole + ".bin").read_bytes()


def test_join_under_hashes(cut, tmp_path):
    _, parts = cut(100)
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in find_shards(parts)}
    assert unshard(parts, tmp_path / "good", hashes=hashes).shards == 6
    with open(f"{parts}-00004-of-00005.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(
        DataError, match=r"base-00004-of-00005\.bin: SHA-256 .*, expected .*; copy it again"
    ):
        unshard(parts, tmp_path / "bad", hashes=hashes)
    assert not (tmp_path / "bad" / "base.bin").exists()
    del hashes["base-00000-of-00005.bin"]
    with pytest.raises(DataError, match="not in the list of hashes"):
        unshard(parts, tmp_path / "bad", hashes=hashes)


def test_cutting_again_keeps_what_is_right(cut, tmp_path):
    whole, parts = cut(100)
    before = {path.name: path.stat().st_mtime_ns for path in find_shards(parts)}
    with open(f"{parts}-00003-of-00005.bin", "r+b") as file:
        file.write(b"\xff\xff")
    cut(100)
    after = {path.name: path.stat().st_mtime_ns for path in find_shards(parts)}
    assert [name for name in before if before[name] != after[name]] == ["base-00003-of-00005.bin"]
    assert IndexedDataset(parts)[5].tolist() == IndexedDataset(whole)[5].tolist()


def test_cutting_is_refused(cut, tmp_path):
    whole, parts = cut(100)
    with pytest.raises(ConfigError, match="has shards of another size, such as base-0000"):
        shard(whole, tmp_path / "by100", size=50)
    with pytest.raises(ConfigError, match="consists of 6 shards already"):
        shard(parts, tmp_path / "again", size=50)
    with pytest.raises(ConfigError, match="nothing to join"):
        unshard(whole)


def test_a_full_disk_keeps_what_was_written(cut, tmp_path, monkeypatch):
    whole, parts = cut(100)
    write_chunk = shard_module.write_chunk

    def full(target, chunk):
        if target.tell() >= 300:
            raise OSError(28, "No space left on device")
        return write_chunk(target, chunk)

    monkeypatch.setattr(shard_module, "write_chunk", full)
    with pytest.raises(
        CastaliaError, match=r"cannot write .*base\.bin: No space left on device; free space"
    ):
        unshard(parts, tmp_path / "out")
    monkeypatch.undo()
    assert unshard(parts, tmp_path / "out").kept == 300
    assert (tmp_path / "out" / "base.bin").read_bytes() == Path(whole + ".bin").read_bytes()


def test_borders_are_where_the_sizes_say(cut):
    _, parts = cut(101)
    buffer = IndexedDataset(parts).buffer
    assert all(b - a == 101 for a, b in pairwise(buffer.starts[:-1].tolist()))
    assert buffer[99:105] == Path(cut(526)[0] + ".bin").read_bytes()[99:105]


def test_damaged_shards_are_seen_by_the_record_before_they_have_a_name(tmp_path):
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add(np.arange(200))
        record = close_with_record(writer, str(tmp_path / "c"), {})
    assert record["bin_sha256"]
    shard(tmp_path / "c", tmp_path / "parts", size=160)
    for name, message in (("c-00001-of-00002.bin", "one of the shards"), ("c.idx", "SHA-256 is")):
        path = tmp_path / "parts" / name
        good = path.read_bytes()
        path.write_bytes(good[:-12] + bytes([good[-12] ^ 1]) + good[-11:])
        with pytest.raises(DataError, match=message):
            unshard(tmp_path / "parts" / "c", tmp_path / "out")
        assert not (tmp_path / "out" / "c.bin").exists()
        path.write_bytes(good)
    assert unshard(tmp_path / "parts" / "c", tmp_path / "out").bytes == 400
