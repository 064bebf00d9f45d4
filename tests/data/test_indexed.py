"""The token file, byte for byte, and what happens when one is damaged."""

import errno
import os
import pickle
import struct

import numpy as np
import pytest

from castalia.core.errors import CastaliaError, DataError
from castalia.data import IndexedDataset, IndexedDatasetWriter, best_dtype

DOCUMENTS = [[1, 2, 3], [], [65535], [7, 8]]
IDX_BYTES = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)
    + struct.pack("<B", 8)
    + struct.pack("<QQ", 4, 5)
    + struct.pack("<4i", 3, 0, 1, 2)
    + struct.pack("<4q", 0, 6, 6, 8)
    + struct.pack("<5q", 0, 1, 2, 3, 4)
)
BIN_BYTES = struct.pack("<6H", 1, 2, 3, 65535, 7, 8)


@pytest.fixture
def prefix(tmp_path):
    """A whole pair, written by hand."""
    (tmp_path / "x.bin").write_bytes(BIN_BYTES)
    (tmp_path / "x.idx").write_bytes(IDX_BYTES)
    return tmp_path / "x"


def test_written_bytes(tmp_path):
    with IndexedDatasetWriter(tmp_path / "new" / "y", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    assert (tmp_path / "new" / "y.bin").read_bytes() == BIN_BYTES
    assert (tmp_path / "new" / "y.idx").read_bytes() == IDX_BYTES
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["y.bin", "y.idx"]


def test_reading(prefix):
    data = IndexedDataset(prefix)
    assert [d.tolist() for d in data] == DOCUMENTS
    assert (len(data), data.dtype, data.sizes.dtype, data.sizes.tolist()) == (
        4,
        np.uint16,
        np.int32,
        [3, 0, 1, 2],
    )
    assert data.pointers.tolist() == [0, 6, 6, 8]
    assert data.doc_idx.tolist() == [0, 1, 2, 3, 4]
    assert data[np.int64(3)].tolist() == data[-1].tolist() == [7, 8]
    assert [d.tolist() for d in data[1:]] == DOCUMENTS[1:]
    assert [d.tolist() for d in data[::-2]] == [[7, 8], []]
    assert data.get(0, 1).tolist() == [2, 3]
    assert data.get(0, offset=1, length=1).tolist() == [2]
    assert data.get(0, 3).tolist() == []
    assert not data[0].flags.writeable


@pytest.mark.parametrize("suffix", [".bin", ".idx", ""])
def test_the_prefix_may_carry_a_suffix(prefix, suffix):
    assert len(IndexedDataset(f"{prefix}{suffix}")) == 4


def test_pickles_as_its_path(prefix):
    data = IndexedDataset(prefix)
    text = pickle.dumps(data)
    assert len(text) < 200 + len(str(prefix))
    assert [d.tolist() for d in pickle.loads(text)] == DOCUMENTS


@pytest.mark.parametrize("index", [4, -5, np.int64(4)])
def test_no_such_document(prefix, index):
    with pytest.raises(IndexError, match="of 4"):
        IndexedDataset(prefix)[index]


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (4, None), (-1, 1), (2, 2)])
def test_no_such_tokens(prefix, offset, length):
    with pytest.raises(IndexError, match="which has 3"):
        IndexedDataset(prefix).get(0, offset, length)


def test_a_document_is_one_row(tmp_path):
    with (
        pytest.raises(
            DataError, match=r"document 1 .*expected tokens of shape \(n,\), got \(2, 2\)"
        ),
        IndexedDatasetWriter(tmp_path / "x", np.int32) as writer,
    ):
        writer.add([1])
        writer.add([[1, 2], [3, 4]])
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_without_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "none", np.int32):
        pass
    assert len(IndexedDataset(tmp_path / "none")) == 0


@pytest.mark.parametrize("length", range(len(IDX_BYTES)))
def test_a_truncated_index_is_refused_at_any_length(prefix, length):
    prefix.with_suffix(".idx").write_bytes(IDX_BYTES[:length])
    with pytest.raises(DataError, match=r"x\.idx"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("length", range(len(BIN_BYTES)))
def test_truncated_tokens_are_refused_at_any_length(prefix, length):
    prefix.with_suffix(".bin").write_bytes(BIN_BYTES[:length])
    with pytest.raises(DataError, match=r"x\.bin.*truncated"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("bit", range(34 * 8))
def test_a_flipped_bit_in_the_header_is_refused(prefix, bit):
    data = bytearray(IDX_BYTES)
    data[bit // 8] ^= 1 << bit % 8
    prefix.with_suffix(".idx").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.idx"):
        IndexedDataset(prefix)


def test_of_a_very_large_file_places_are_checked_where_they_are_read(prefix, monkeypatch):
    monkeypatch.setattr("castalia.data.indexed.CHECKED_AT_OPENING", 1)
    for at, value, late in ((38, -4, False), (34 + 16, -2, True), (34 + 16, 10**9, True)):
        data = bytearray(IDX_BYTES)
        struct.pack_into("<i" if at < 50 else "<q", data, at, value)
        prefix.with_suffix(".idx").write_bytes(data)
        with pytest.raises(DataError, match=r"do not belong together"):
            dataset = IndexedDataset(prefix)
            assert late
            dataset[0]
    prefix.with_suffix(".idx").write_bytes(IDX_BYTES)
    prefix.with_suffix(".bin").write_bytes(BIN_BYTES[:-1])
    with pytest.raises(DataError, match=r"do not belong together"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("stop", ["bin", "idx"])
def test_a_file_made_again_is_never_new_tokens_under_the_old_index(prefix, monkeypatch, stop):
    """Killed before either of the two renames, what is left is the old pair or none."""
    real = os.replace

    def replace(source, target):
        if str(target).endswith(stop):
            raise KeyboardInterrupt
        real(source, target)

    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add([9, 9, 9, 9, 9, 9, 9])
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
        monkeypatch.undo()
        with pytest.raises(DataError, match="no such file"):
            IndexedDataset(prefix)


def test_places_outside_the_tokens_are_refused(prefix):
    for at, value in ((34, 7), (34, -1), (38, 4), (34 + 16, -2), (34 + 40, 10)):
        data = bytearray(IDX_BYTES)
        struct.pack_into("<i" if at < 50 else "<q", data, at, value)
        prefix.with_suffix(".idx").write_bytes(data)
        with pytest.raises(DataError, match=r"do not belong together"):
            IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not the index of a token file"),
        (b"PK\x03\x04" + bytes(200), "not the index of a token file"),
        (b"TNTIDX\x00\x00" + bytes(200), "old `cached` format"),
        (IDX_BYTES + b"\x09\x09", "truncated or damaged"),
    ],
)
def test_foreign_index(prefix, text, message):
    prefix.with_suffix(".idx").write_bytes(text)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_modes_of_megatron_core_are_left_alone(prefix):
    prefix.with_suffix(".idx").write_bytes(IDX_BYTES + bytes([0, 0, 1, 0]))
    assert len(IndexedDataset(prefix)) == 4


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"x\{suffix}: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 1), ("i1", 2), ("i2", 3), ("i4", 4), ("i8", 5), ("f4", 6), ("f8", 7), ("u2", 8)],
)
def test_every_dtype_has_its_code(tmp_path, dtype, code):
    with IndexedDatasetWriter(tmp_path / "x", dtype) as writer:
        writer.add(np.array([1, 100]))
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    data = IndexedDataset(tmp_path / "x")
    assert (data.dtype, data[0].tolist()) == (np.dtype(dtype), [1, 100])


def test_unknown_dtype(tmp_path):
    with pytest.raises(DataError, match="cannot hold dtype uint64; choose one of uint8"):
        IndexedDatasetWriter(tmp_path / "x", np.uint64)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(65499, np.uint16), (65500, np.int32), (None, np.int32), (257, np.uint16)]
)
def test_dtype_for_a_vocabulary(vocab, dtype):
    assert best_dtype(vocab) == dtype


@pytest.mark.parametrize("tokens", [[65536], [-1], [0, 1 << 40]])
def test_a_token_that_does_not_fit(tmp_path, tokens):
    with (
        pytest.raises(DataError, match=r"document 1 .*does not fit uint16"),
        IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add([1])
        writer.add(tokens)
    assert list(tmp_path.iterdir()) == []


def test_tokens_must_be_integers(tmp_path):
    with (
        pytest.raises(DataError, match="must be integers, got float64"),
        IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer,
    ):
        writer.add([1.5])


def test_an_error_leaves_the_old_file(tmp_path, prefix):
    with (
        pytest.raises(RuntimeError, match="stop"),
        IndexedDatasetWriter(prefix, np.uint16) as writer,
    ):
        writer.add([9, 9])
        raise RuntimeError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert prefix.with_suffix(".bin").read_bytes() == BIN_BYTES


def test_a_full_disk_leaves_nothing(tmp_path):
    with (
        pytest.raises(CastaliaError, match="No space left"),
        IndexedDatasetWriter(tmp_path / "x", "i8") as writer,
    ):
        writer.file = FullDisk(writer.file)
        writer.add(range(1000))
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """An open file on a disk with no room."""

    def __init__(self, file):
        self.file = file

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CastaliaError, match="cannot write"):
        IndexedDatasetWriter(tmp_path / "file" / "x", np.uint16)


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    left = [tmp_path / f".out{suffix}.0123abcd.tmp" for suffix in (".bin", ".idx", ".json")]
    for path in (*left, tmp_path / ".other.bin.0123abcd.tmp"):
        path.write_bytes(b"left")
    first = IndexedDatasetWriter(tmp_path / "out", np.uint16)
    first.add([1, 2])
    assert not any(path.exists() for path in left)
    # That of a living writer stays, and so do those of its other files.
    left[1].write_bytes(b"its")
    with IndexedDatasetWriter(tmp_path / "out", np.uint16) as second:
        second.add([3])
    first.close()
    assert IndexedDataset(tmp_path / "out")[0].tolist() == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.bin",
        "out.idx",
        ".out.idx.0123abcd.tmp",
        ".other.bin.0123abcd.tmp",
    }
