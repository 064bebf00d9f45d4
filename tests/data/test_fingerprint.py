"""The fingerprint sees every change of the rows or their order, and nothing else."""

import json
import shutil

import numpy as np
import pytest

from castalia.data import IndexedDataset, IndexedDatasetWriter, changed
from castalia.data.fingerprint import array_hash, bin_hash, fingerprint, idx_hash

ORDER = {"seed": 1, "seq_length": 8, "weights": [0.5, 0.5]}


def of(*prefixes, valid=(), **order):
    return fingerprint(
        [IndexedDataset(p) for p in prefixes],
        [IndexedDataset(p) for p in valid],
        order=ORDER | order,
    )


def test_survives_json(token_file):
    before = of(token_file("a", [3, 4]))
    assert changed(json.loads(json.dumps(before)), before) == []


def test_another_place_is_no_change(token_file, tmp_path):
    before = of(token_file("a", [3, 4]))
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.move(tmp_path / f"a{suffix}", tmp_path / "moved" / f"b{suffix}")
    assert changed(before, of(tmp_path / "moved" / "b")) == []


def test_sizes(token_file):
    before = of(token_file("a", [3, 4]))
    after = of(token_file("a", [3, 5, 1], np.int32))
    assert changed(before, after) == [
        "train source 0 (a): documents was 2, is 3",
        "train source 0 (a): tokens was 7, is 9",
        "train source 0 (a): dtype was uint16, is int32",
    ]


@pytest.mark.parametrize(("sizes", "first"), [([4, 3], 0), ([3, 4], 1)])
def test_contents(token_file, sizes, first):
    before = of(token_file("a", [3, 4]))
    assert changed(before, of(token_file("a", sizes, first=first))) == [
        "train source 0 (a): contents differ (same sizes, different hash)"
    ]


def test_settings_of_the_order(token_file):
    before = of(token_file("a", [3, 4]))
    assert changed(before, of(token_file("a", [3, 4]), seed=2, epochs=[3])) == [
        "order: seed was 1, is 2",
        "order: epochs was None, is [3] passes over the data (train.steps decides): the documents"
        " of all passes are shuffled together",
    ]


def test_number_of_sources(token_file):
    a = token_file("a", [3, 4])
    b = token_file("b", [5])
    assert changed(of(a, b), of(a, valid=[b])) == [
        "train: 2 sources before, 1 now",
        "valid: 0 sources before, 1 now",
    ]


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    for name, value in (("FULL_BYTES", 1000), ("BLOCK_BYTES", 16), ("BLOCKS", 5)):
        monkeypatch.setattr(f"castalia.data.fingerprint.{name}", value)
    with IndexedDatasetWriter(tmp_path / "a", np.uint8) as writer:
        writer.add(np.zeros(1001, np.uint8))
    path = tmp_path / "a.bin"
    how, before = bin_hash(path)
    assert how == "5 evenly spaced blocks of 16 bytes"
    for place in (0, 15, 985 // 4, 985 // 2, 985, 1000):
        data = bytearray(1001)
        data[place] = 1
        path.write_bytes(data)
        assert bin_hash(path)[1] != before
    path.write_bytes(bytes(1000))
    assert bin_hash(path)[0] == "whole"


def test_of_a_large_index_every_size_counts(token_file, monkeypatch):
    monkeypatch.setattr("castalia.data.fingerprint.CHUNK_BYTES", 64)
    sizes = list(range(1, 101))
    whole = idx_hash(IndexedDataset(token_file("a", sizes)))
    for name, value in (("FULL_BYTES", 1000), ("BLOCK_BYTES", 16), ("BLOCKS", 5)):
        monkeypatch.setattr(f"castalia.data.fingerprint.{name}", value)
    hashes = {whole, idx_hash(IndexedDataset(token_file("a", sizes)))}
    for i in (0, 1, 15, 16, 50, 98):
        sizes[i], sizes[i + 1] = sizes[i + 1], sizes[i]
        hashes.add(idx_hash(IndexedDataset(token_file("a", sizes))))
    assert len(hashes) == 8
    assert idx_hash(IndexedDataset(token_file("b", sizes))) in hashes


def test_array_hash_sees_numbers_shape_and_type(monkeypatch):
    array = np.arange(1000, dtype=np.int32)
    first = array_hash(array)
    monkeypatch.setattr("castalia.data.fingerprint.CHUNK_BYTES", 4000)
    assert array_hash(array.copy()) == first
    others = [array[::-1], array.reshape(10, 100), array.view(np.uint32), array[:-1], array[:0]]
    assert len({first, *map(array_hash, others)}) == 6
