"""The order against a slow transcription of the published algorithm and its closed form."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from castalia.core.errors import ConfigError, DataError
from castalia.data import NeoxOrder, split_documents, weight_by_num_documents
from castalia.data import order as order_module
from castalia.data.order import place_rows, rows_per_source

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=30)


def as_published(sizes, documents, seq_length, num_samples, seed):
    """gpt2_dataset.py:189-413 of GPT-NeoX, step by step: (doc_idx, sample_idx, shuffle_idx)."""
    tokens = sum(sizes[d] for d in documents)
    epochs = 1
    while (epochs * tokens - 1) // seq_length < num_samples:
        epochs += 1
    random = np.random.RandomState(seed)
    doc_idx = np.array([d for _ in range(epochs) for d in documents], dtype=np.int32)
    random.shuffle(doc_idx)
    rows = (epochs * tokens - 1) // seq_length
    sample_idx = [(0, 0)]
    document = 0
    offset = 0
    for _ in range(rows):
        need = seq_length + 1
        while need != 0:
            available = sizes[doc_idx[document]] - offset
            need -= available
            if need <= 0:
                offset += need + available - 1
                need = 0
            else:
                document += 1
                offset = 0
        sample_idx.append((document, offset))
    shuffle_idx = np.arange(rows, dtype=np.uint32)
    random.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


@settings(deadline=None, max_examples=200)
@given(
    sizes=SIZES,
    seq_length=st.integers(1, 20),
    rows=st.integers(1, 60),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_equals_the_published_algorithm(sizes, seq_length, rows, seed, data):
    start = data.draw(st.integers(0, len(sizes) - 1))
    documents = range(start, data.draw(st.integers(start + 1, len(sizes))))
    assume(sum(sizes[d] for d in documents) >= seq_length)
    doc_idx, sample_idx, shuffle_idx = as_published(sizes, documents, seq_length, rows, seed)
    order = NeoxOrder(
        sizes, seq_length=seq_length, num_samples=rows, seed=seed, documents=documents
    )
    assert order.doc_idx.tolist() == doc_idx.tolist()
    assert order.sample_idx.tolist() == [list(pair) for pair in sample_idx]
    assert order.shuffle_idx.tolist() == shuffle_idx.tolist()
    assert len(order) == len(shuffle_idx) - 1


@settings(deadline=None, max_examples=200)
@given(sizes=SIZES, seq_length=st.integers(1, 20), rows=st.integers(1, 60), seed=st.integers(0, 9))
def test_row_k_starts_at_token_k_times_l_of_the_stream(sizes, seq_length, rows, seed):
    assume(sum(sizes) >= seq_length)
    order = NeoxOrder(sizes, seq_length=seq_length, num_samples=rows, seed=seed)
    stream = [
        (place, offset) for place, d in enumerate(order.doc_idx) for offset in range(sizes[d])
    ]
    expected = [stream[k * seq_length] for k in range(len(order.sample_idx))]
    expected[0] = (0, 0)
    assert [tuple(pair) for pair in order.sample_idx.tolist()] == expected
    assert len(order.shuffle_idx) >= rows
    assert order.epochs == 1 or ((order.epochs - 1) * sum(sizes) - 1) // seq_length < rows


@pytest.mark.parametrize("block", [1, 3, 64])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, block):
    sizes = np.random.RandomState(3).randint(0, 40, 200)
    whole = NeoxOrder(sizes, seq_length=7, num_samples=900, seed=5).sample_idx
    monkeypatch.setattr(order_module, "BLOCK", block)
    assert (NeoxOrder(sizes, seq_length=7, num_samples=900, seed=5).sample_idx == whole).all()


def test_places_are_wide_where_int32_would_not_hold_them():
    """GPT-NeoX's rule counts both columns: 2 · ((tokens - 1) / L + 1) >= 2^31 - 1."""
    sizes = np.array([2**31 - 1, 2**31 - 1], dtype=np.int32)
    order = np.zeros(5, dtype=np.int32)
    total = 5 * int(sizes[0])
    assert place_rows(sizes, order, total // 4, 3, total).dtype == np.int32
    wide = place_rows(sizes, order, total // 4, 3, total * 2**30)
    assert wide.dtype == np.int64
    assert wide.tolist() == place_rows(sizes, order, total // 4, 3, total).tolist()
    assert wide[3].tolist() == [3, 3 * (total // 4) - 3 * (2**31 - 1)]


@pytest.mark.parametrize(("sizes", "seq_length"), [([3, 4], 8), ([0, 0], 1), ([], 4)])
def test_a_row_longer_than_all_data(sizes, seq_length):
    with pytest.raises(
        DataError, match=rf"a row needs {seq_length + 1} tokens, but .* hold {sum(sizes)} in all"
    ):
        NeoxOrder(sizes, seq_length=seq_length, num_samples=1, seed=0)


def test_more_rows_of_the_same_epochs_keep_the_order():
    a = NeoxOrder([50, 60], seq_length=4, num_samples=3, seed=1)
    b = NeoxOrder([50, 60], seq_length=4, num_samples=27, seed=1)
    assert a.epochs == b.epochs == 1
    assert a.shuffle_idx.tolist() == b.shuffle_idx.tolist()
    assert NeoxOrder([50, 60], seq_length=4, num_samples=28, seed=1).epochs == 2


def test_places_beyond_the_end_wrap_at_rows_less_one():
    order = NeoxOrder([5, 3, 7, 2, 9], seq_length=4, num_samples=10, seed=1234)
    assert [order.wrap(i) for i in (0, 11, 12, 22, 25)] == [0, 11, 1, 0, 3]


@pytest.mark.parametrize(
    ("split", "documents", "ends"),
    [
        ("969, 30, 1", 1000, [969, 999, 1000]),
        ("969, 30, 1", 10, [10, 10, 10]),
        ("995,4,1", 12345, [12284, 12333, 12345]),
        ("98/1/1", 250, [246, 248, 250]),
        ("1,1", 5, [3, 5, 5]),
        ("100", 7, [7, 7, 7]),
        ("1,1,1", 8, [2, 5, 8]),
        ("1,1,1,9", 9, [3, 6, 9]),
        ("0,1,1", 3, [0, 1, 3]),
    ],
)
def test_split(split, documents, ends):
    parts = split_documents(split, documents)
    assert [part.stop for part in parts] == ends
    assert [part.start for part in parts] == [0, *ends[:2]]


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2,0", "nan,1"])
def test_a_split_that_says_nothing(split):
    with pytest.raises(ConfigError, match=r"expected shares of train, valid and test"):
        split_documents(split, 10)


def test_rows_a_source_carry_the_margin():
    assert rows_per_source([3.0, 1.0], 1000) == [754, 252]
    assert rows_per_source([1, 0], 10) == [11, 0]


def test_weights_from_documents():
    """By hand: shares .2 .3 .5, alpha 1: p · (1 - p) = .16 .21 .25, of .62."""
    assert weight_by_num_documents([20, 30, 50], 1.0) == pytest.approx(
        [0.16 / 0.62, 0.21 / 0.62, 0.25 / 0.62]
    )
    assert weight_by_num_documents([1, 9], 0.0) == pytest.approx([0.9, 0.1])
    assert weight_by_num_documents([7], 0.3) == [1.0]
