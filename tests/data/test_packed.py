"""Rows from a token file: equal to slices of the document stream, and traced to their documents."""

import pickle

import numpy as np
import pytest

from castalia.core.errors import DataError
from castalia.data import IndexedDataset, IndexedDatasetWriter, NeoxOrder, PackedDataset

SIZES = [0, 7, 0, 0, 1, 1, 1, 30, 2, 0, 5]


@pytest.fixture
def packed(token_file):
    data = IndexedDataset(token_file("x", SIZES))
    return PackedDataset(data, NeoxOrder(data.sizes, seq_length=6, num_samples=20, seed=3))


def test_rows_are_slices_of_the_stream(packed):
    order = packed.order
    stream = np.concatenate([packed.dataset[d] for d in order.doc_idx])
    for place, k in enumerate(order.shuffle_idx):
        row = packed[place]
        assert (row.dtype, row.tolist()) == (np.int64, stream[6 * int(k) : 6 * int(k) + 7].tolist())


def test_pieces_spell_the_row(packed):
    for place in range(len(packed.order.shuffle_idx)):
        pieces = packed.documents_of(place)
        spelled = [
            packed.dataset.get(piece.document, piece.start, piece.length) for piece in pieces
        ]
        assert np.concatenate(spelled).tolist() == packed[place].tolist()
        assert all(piece.length > 0 for piece in pieces)


def test_places_without_a_row(packed):
    rows = len(packed.order.shuffle_idx)
    assert len(packed) == rows - 1
    assert packed[np.int64(rows - 1)].shape == (7,)
    for place in (rows, -1):
        with pytest.raises(IndexError, match=f"of {rows}"):
            packed[place]


def test_only_some_documents_are_served(token_file):
    data = IndexedDataset(token_file("x", [10] * 6))
    order = NeoxOrder(data.sizes, seq_length=4, num_samples=9, seed=3, documents=range(2, 5))
    packed = PackedDataset(data, order)
    rows = range(len(order.shuffle_idx))
    assert {piece.document for i in rows for piece in packed.documents_of(i)} == {2, 3, 4}
    assert {int(token) for i in rows for token in packed[i]} <= set(range(20, 50))


def test_it_pickles(packed):
    again = pickle.loads(pickle.dumps(packed))
    assert [again[i].tolist() for i in range(5)] == [packed[i].tolist() for i in range(5)]


def test_floats_are_no_tokens(tmp_path):
    with IndexedDatasetWriter(tmp_path / "f", np.float32) as writer:
        writer.add(np.ones(9, np.float32))
    data = IndexedDataset(tmp_path / "f")
    with pytest.raises(DataError, match=r"f: holds float32, expected integers"):
        PackedDataset(data, NeoxOrder(data.sizes, seq_length=2, num_samples=1, seed=0))
