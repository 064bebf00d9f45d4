"""The compiled loops of orders against numpy's, number by number."""

import numpy as np
import pytest

from castalia.data import NeoxOrder, compiled_order
from castalia.data import order as order_module


@pytest.fixture
def library(monkeypatch):
    if compiled_order.order_library() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(compiled_order, "LEAST", 2)


# Sizes around powers of two, where the mask of the draws changes, and around a batch of 128.
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 127, 128, 129, 130, 1025, 70_000])
def test_a_shuffle_is_that_of_numpy_and_leaves_its_generator(library, monkeypatch, n):
    monkeypatch.setattr(compiled_order, "DRAWS", 1000)  # several rounds of draws
    for dtype in (np.int32, np.uint32, np.int64):
        expected = np.arange(n, dtype=dtype)
        values = expected.copy()
        theirs, ours = (np.random.RandomState(n) for _ in range(2))
        theirs.shuffle(expected)
        compiled_order.shuffle(ours, values)
        assert np.array_equal(values, expected)
        assert ours.random_sample() == theirs.random_sample()


def maps_of(sizes, **settings):
    order = NeoxOrder(sizes, **settings)
    return [order.doc_idx, order.sample_idx, order.shuffle_idx]


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_an_order_is_the_same_with_and_without_the_library(library, monkeypatch, kind):
    random = np.random.default_rng(0)
    used = []
    place = compiled_order.place_rows_compiled
    monkeypatch.setattr(
        order_module,
        "place_rows_compiled",
        lambda *given: used.append(place(*given)) or used[-1],
    )
    for documents, mean, length in ((50, 3, 7), (300, 40, 16), (2000, 1, 64)):
        sizes = random.poisson(mean, documents).astype(kind)  # empty ones among them
        chosen = random.permutation(documents)[: documents // 2]
        settings = {"seq_length": length, "num_samples": 40, "seed": 5, "documents": chosen}
        ours = maps_of(sizes, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(compiled_order, "order_library", lambda: None)
            expected = maps_of(sizes, **settings)
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    # Other sizes than int32 are numpy's business.
    assert used[::2] == [kind == np.int32] * 3 and not any(used[1::2])


def test_wide_places_and_numbers_from_the_back(library, monkeypatch):
    sizes = np.array([3, 0, 5, 4], dtype=np.int32)
    doc_idx = np.array([2, 1, 0, 3], dtype=np.int32)
    starts = np.zeros((4, 2), dtype=np.int64)
    assert compiled_order.place_rows_compiled(sizes, doc_idx, 3, starts)
    assert starts.tolist() == [[0, 0], [0, 3], [2, 1], [3, 1]]
    odd = np.frombuffer(b"\0" + sizes.tobytes(), np.int32, offset=1)  # as in a mapped .idx
    again = np.zeros_like(starts)
    assert compiled_order.place_rows_compiled(odd, doc_idx, 3, again)
    assert np.array_equal(again, starts)
    for number in (-1, 4):
        doc_idx[1] = number
        assert not compiled_order.place_rows_compiled(sizes, doc_idx, 3, starts)


def test_small_orders_ask_for_no_library(monkeypatch):
    monkeypatch.setattr(compiled_order, "order_library", lambda: 1 // 0)
    compiled_order.shuffle(np.random.RandomState(0), np.arange(1000, dtype=np.int32))
