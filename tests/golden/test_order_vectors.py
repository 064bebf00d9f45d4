"""Vectors from GPT-NeoX's own functions (numpy 2.4.6): documents, rows, shuffle and blend."""

import hashlib

import numpy as np

from castalia.data import IndexedDataset, IndexedDatasetWriter, NeoxOrder, PackedDataset, blend
from castalia.data.blending import in_lanes
from castalia.data.order import rows_per_source

SMALL_SIZES = [5, 3, 7, 2, 9]
SMALL_SAMPLE_IDX = [
    [0, 0], [0, 4], [1, 1], [1, 5], [2, 2], [2, 6], [3, 1], [4, 2], [5, 1], [6, 3], [6, 7], [7, 2],
    [8, 1],
]  # fmt: skip


def start_of_hash(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_five_documents():
    order = NeoxOrder(SMALL_SIZES, seq_length=4, num_samples=10, seed=1234)
    assert (order.tokens_per_epoch, order.epochs, len(order)) == (26, 2, 11)
    assert order.doc_idx.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3]
    assert order.sample_idx.tolist() == SMALL_SAMPLE_IDX
    assert order.shuffle_idx.tolist() == [3, 11, 2, 1, 7, 5, 4, 0, 8, 6, 10, 9]
    assert [a.dtype for a in (order.doc_idx, order.sample_idx, order.shuffle_idx)] == [
        np.int32,
        np.int32,
        np.uint32,
    ]


def test_the_rows_served_from_five_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "five", np.uint16) as writer:
        for document, size in enumerate(SMALL_SIZES):
            writer.add([100 * document + place for place in range(size)])
    order = NeoxOrder(SMALL_SIZES, seq_length=4, num_samples=10, seed=1234)
    packed = PackedDataset(IndexedDataset(tmp_path / "five"), order)
    assert packed[0].tolist() == [205, 206, 400, 401, 402]
    assert packed[1].tolist() == [2, 3, 4, 100, 101]
    assert packed[2].tolist() == [201, 202, 203, 204, 205]


def test_a_thousand_documents():
    sizes = np.arange(1000) * 7919 % 997 + 1
    order = NeoxOrder(sizes, seq_length=128, num_samples=10000, seed=1234)
    assert (order.tokens_per_epoch, order.epochs, order.sample_idx.shape) == (499329, 3, (11704, 2))
    assert order.doc_idx[:5].tolist() == [936, 85, 45, 230, 676]
    assert order.sample_idx[-1].tolist() == [2999, 657]
    assert order.shuffle_idx[:5].tolist() == [8224, 9398, 11295, 2287, 2656]
    assert start_of_hash(order.doc_idx) == "deba9b07e6d1c8fa"
    assert start_of_hash(order.sample_idx) == "7749f4dd0afe0838"
    assert start_of_hash(order.shuffle_idx) == "ed8e4b31a0fa6480"


def test_blend_of_three():
    picks, numbers = blend([0.5, 0.3, 0.2], 16)
    assert picks.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3, 2, 6, 4, 7]
    assert in_lanes(np.array([0.5, 0.3, 0.2]), 16, length=4, warmup=2).tolist() == picks.tolist()


def test_pythia_asks_for_as_many_rows_as_its_index_files_say():
    """Published names carry 147164160ns: the margin applies even to a single path in the list."""
    assert rows_per_source([1.0], 143000 * 1024) == [147164160]
