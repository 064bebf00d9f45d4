"""`build_rows` against GPT-NeoX's two ways of naming data, and the vocabulary check."""

import math

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.data import (
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    NeoxOrder,
    PackedDataset,
    blend,
    build_rows,
    changed,
    check_vocab,
    train_tokenizer,
    weight_by_num_documents,
)
from castalia.data.run_rows import rows_of_a_pass
from castalia.data.sources import left_out


def build(eval_every=None, steps=10, batch_size=4, eval_batches=2, seed=1234, epochs=None, **data):
    config = DataConfig(seq_length=8, **data)
    numbers = {
        "steps": steps,
        "batch_size": batch_size,
        "eval_every": eval_every,
        "eval_batches": eval_batches,
        "epochs": epochs,
    }
    return build_rows(config, seed=seed, **numbers)


def packed(prefix, rows, documents=None):
    data = IndexedDataset(prefix)
    return PackedDataset(
        data, NeoxOrder(data.sizes, seq_length=8, num_samples=rows, seed=1234, documents=documents)
    )


def test_one_prefix_with_split_is_data_path(token_file):
    prefix = token_file("a", [20] * 50)
    rows = build(train=[prefix], split="8,2,0", eval_every=4)
    train = packed(prefix, 40, range(40))
    valid = packed(prefix, (10 // 4 + 1) * 2 * 4, range(40, 50))
    assert rows.epochs == [train.order.epochs]
    assert rows.tokens == [800]
    assert (rows.sources, rows.weights) == (["a"], [1.0])
    for p in range(40):
        row, source, index = rows.train[p]
        assert (row.tolist(), source, index) == (train[p].tolist(), 0, p)
    for p in range(24):
        assert rows.valid[p][0].tolist() == valid[p].tolist()


def test_one_prefix_without_split_is_a_list_of_one(token_file):
    """Pythia's case: 1.005 times the rows, all documents, one source that wraps at rows - 1."""
    prefix = token_file("a", [9] * 40)
    rows = build(train=[prefix])
    expected = packed(prefix, math.ceil(40 * 1.005))
    assert len(rows.train) == len(expected.order.shuffle_idx) - 1
    assert [rows.train[p][0].tolist() for p in range(40)] == [
        expected[p].tolist() for p in range(40)
    ]
    assert rows.valid is None


def test_several_sources_are_blended(token_file):
    prefixes = [token_file("a", [30] * 9), token_file("b", [17] * 40, first=1000)]
    rows = build(train=prefixes, weights=[1, 3], valid=prefixes[1], eval_every=5)
    packs = [
        packed(prefixes[0], math.ceil(40 * 0.25 * 1.005)),
        packed(prefixes[1], math.ceil(40 * 0.75 * 1.005)),
    ]
    picks, numbers = blend([0.25, 0.75], 40)
    for p in range(40):
        row, source, _ = rows.train[p]
        assert source == picks[p]
        assert row.tolist() == packs[source][numbers[p]].tolist()
        assert rows.train.documents_of(p) == (source, packs[source].documents_of(numbers[p]))
    assert (rows.sources, rows.weights) == (["a", "b"], [0.25, 0.75])
    valid = packed(prefixes[1], math.ceil((10 // 5 + 1) * 2 * 4 * 1.005))
    assert rows.valid[23][0].tolist() == valid[23].tolist()


def test_places_beyond_the_end_wrap(token_file):
    """A blend wraps at the sum of its sources' periods; a source at its rows less one."""
    rows = build(train=[token_file("a", [40]), token_file("b", [40])], steps=2, batch_size=4)
    sizes = [len(pack.order.shuffle_idx) for pack in rows.train.row_sources]
    assert (sizes, len(rows.train)) == ([9, 9], 16)
    again = rows.train[len(rows.train) + 3]
    assert again[0].tolist() == rows.train[3][0].tolist()
    assert again[2] == len(rows.train) + 3
    one = build(train=[token_file("c", [90])], split="1,0,0", steps=2).train
    n = len(one.row_sources[0].order.shuffle_idx)
    assert one[n][0].tolist() == one[n % (n - 1)][0].tolist()
    with pytest.raises(IndexError, match="count from 0"):
        one[-1]


def test_the_smallest_run_has_rows(token_file):
    """GPT-NeoX cannot blend single rows, because the size would be 0; Castalia can."""
    rows = build(train=[token_file("a", [9]), token_file("b", [9])], steps=1, batch_size=2)
    assert [rows.train[p][1] for p in range(2)] == [0, 1]


def test_same_names_are_told_apart(token_file, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    prefixes = [token_file("x/train", [20]), token_file("y/train", [20])]
    assert build(train=prefixes).sources == prefixes


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow", "best_fit"])
@pytest.mark.parametrize("weights", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1e-9, 0, 1]])
def test_a_source_without_weight_gives_no_rows(token_file, packing, weights):
    """GPT-NeoX's blend draws every source among its first places, also those of weight 0."""
    train = [token_file(name, [90] * 5) for name in "abc"]
    # Too short for a row, or without a document: left out, neither can stop a run.
    train[weights.index(0)] = token_file("tiny", [3] if packing == "packed" else [])
    used = [weights.index(1)]
    rows = build(
        train=train,
        weights=weights,
        valid=train,
        valid_weights=weights,
        packing=packing,
        eval_every=5,
    )
    for served, places in ((rows.train, 40), (rows.valid, 24)):
        assert {served[p][1] for p in range(places)} == set(used)
        assert served.with_rows() == used
    assert (rows.sources, rows.weights) == (
        build(train=train, weights=weights, packing=packing).sources,
        [weight / sum(weights) for weight in weights],
    )
    assert [bool(epochs) for epochs in rows.epochs] == [weight == 1 for weight in weights]


def test_ready_rows_without_weight_are_not_read(token_file):
    train = [token_file(name, [9] * 20) for name in "ab"]
    rows = build(train=train, weights=[0, 1], order="file").train
    assert [rows[p][1] for p in range(40)] == [1] * 40
    assert rows[25][0].tolist() == IndexedDataset(train[1])[5].tolist()


@pytest.mark.parametrize("weights", [[1e-5, 1], [2e-6, 0.4, 0.6], [1e-7, 1]])
def test_a_small_weight_keeps_the_order_of_neox(token_file, weights):
    """A weight that people write, in a short run; and 1e-7 where that is a row of the run."""
    train = [token_file(name, [90] * 5) for name in "abc"[: len(weights)]]
    steps = 10 if weights[0] > 1e-6 else 1_500_000
    config = DataConfig(seq_length=8, train=train, weights=weights)
    assert left_out(weights, len(weights), 4 * steps) == [False] * len(weights)
    rows = build_rows(config, seed=1, batch_size=4, steps=10, eval_every=None, eval_batches=1)
    if weights[0] > 1e-6:
        picks = blend(weights, 40)[0].tolist()
        assert [rows.train[p][1] for p in range(40)] == picks
        assert 0 in picks


def test_more_steps_of_the_same_epochs_are_the_same_data(token_file):
    prefix = token_file("a", [9] * 100)
    before, longer, again = (
        build(train=[prefix], split="1", steps=steps).fingerprint for steps in (3, 20, 60)
    )
    assert changed(before, longer) == []
    assert changed(before, again) == [
        "order: epochs was [1], is [3] passes over the data (train.steps decides): the documents of"
        " all passes are shuffled together"
    ]
    assert "order: batch_size was 4, is 5" in changed(
        before, build(train=[prefix], split="1", batch_size=5).fingerprint
    )


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize(
    "packing", ["packed", "pack_until_overflow", "unpacked", "best_fit", "ready rows"]
)
def test_a_longer_run_has_the_same_data_if_its_first_rows_are_the_same(tmp_path, packing, sources):
    """Within a pass over the data and past it: what `changed` says is what the rows show."""
    random = np.random.default_rng(0)
    prefixes = [str(tmp_path / name) for name in "ab"[:sources]]
    for prefix in prefixes:
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            for size in random.integers(2, 9, 60):
                writer.add(random.integers(0, 60_000, 9 if packing == "ready rows" else size))
    way = {"order": "file"} if packing == "ready rows" else {"packing": packing}
    runs = [build(train=prefixes, steps=steps, **way) for steps in (4, 6, 60)]
    firsts = [[run.train[place][0].tolist() for place in range(16)] for run in runs]
    sames = []
    for longer, first in zip(runs[1:], firsts[1:], strict=True):
        sames.append(first == firsts[0])
        assert (changed(runs[0].fingerprint, longer.fingerprint) == []) is sames[-1]
    by_pass = packing in ("best_fit", "ready rows")
    assert sames == [by_pass or packing == "packed", by_pass]


def test_no_documents_to_validate_on(token_file):
    assert build(train=[token_file("a", [90] * 5)], split="969, 30, 1", eval_every=2).valid is None


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ConfigError, r"data\.train is empty"),
        (
            {"train": "a", "valid": "a", "split": "9,1,0"},
            ConfigError,
            r"data\.split and data\.valid both",
        ),
        ({"train": "gone"}, DataError, r"gone\.idx: no such file"),
        (
            {"train": "tiny"},
            DataError,
            r"tiny: a row needs 9 tokens, but the 1 documents hold 3 in all",
        ),
        (
            {"train": "a", "split": "0,1,0"},
            DataError,
            r"a \(documents 0 to 0 under data\.split '0,1,0'\): a row needs",
        ),
        (
            {"train": "a", "eod_mask_loss": True},
            ConfigError,
            r"data\.eod_mask_loss needs data\.tokenizer",
        ),
    ],
)
def test_what_cannot_be_built(token_file, tmp_path, monkeypatch, data, error, message):
    token_file("a", [90])
    token_file("tiny", [3])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        build(**data)


def test_end_of_document_id_for_the_mask(token_file):
    prefix = token_file("a", [90])
    assert build(train=[prefix], tokenizer="bytes", eod_mask_loss=True).eod_id == 256
    assert build(train=[prefix], tokenizer="bytes").eod_id is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_beyond_the_vocabulary(token_file, dtype):
    data = IndexedDataset(token_file("a", [10, 0, 10], dtype))
    check_vocab(data, 20)
    with pytest.raises(
        DataError, match=r"a: document 2 has token id 15, but the model's vocabulary has 15 ids"
    ):
        check_vocab(data, 15)


def test_negative_ids(token_file):
    with pytest.raises(DataError, match="document 0 has token id -3"):
        check_vocab(IndexedDataset(token_file("a", [10], np.int32, first=-3)), 20)


def test_token_files_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a text of some length"}\n' * 20)
    other = train_tokenizer(["a text of some length"], 270, tmp_path / "tokenizer.json")
    prepare([tmp_path / "a.jsonl"], tmp_path / "bytes", "bytes")
    prepare([tmp_path / "a.jsonl"], tmp_path / "trained", other)
    one = str(tmp_path / "bytes")
    two = str(tmp_path / "trained")
    with pytest.raises(DataError, match=f"{two} and {one} were made with different tokenizers"):
        build(train=[one, two])
    with pytest.raises(DataError, match="different tokenizers"):
        build(train=[one], valid=[two])
    with pytest.raises(
        ConfigError, match=r"give the right one with data\.tokenizer, or set it to null"
    ):
        build(train=[two], tokenizer="bytes")
    for tokenizer in (None, str(tmp_path / "tokenizer.json")):
        build(train=[two], tokenizer=tokenizer)
    (tmp_path / "trained.json").unlink()  # as a file of GPT-NeoX, which has no record
    build(train=[one, two], tokenizer="bytes")


def test_weights_by_the_number_of_documents(token_file):
    prefixes = [token_file("a", [30] * 9), token_file("b", [17] * 40)]
    rows = build(train=prefixes, valid=prefixes, document_alpha=0.3, eval_every=5)
    weights = weight_by_num_documents([9, 40], 0.3)
    given = build(
        train=prefixes, valid=prefixes, weights=weights, valid_weights=weights, eval_every=5
    )
    assert rows.weights == given.weights == weights
    assert rows.fingerprint == given.fingerprint
    assert [rows.valid[p][1] for p in range(24)] == [given.valid[p][1] for p in range(24)]
    with pytest.raises(ValueError, match="document_alpha weights the sources by their documents"):
        DataConfig(train=prefixes, weights=[1, 2], document_alpha=1.0)


@pytest.mark.parametrize("data", [{}, {"split": "4,1,0"}, {"order": "file"}])
def test_whole_passes_serve_every_row_once_a_pass(token_file, data):
    """GPT-NeoX's train_epochs: the same order in every pass, without the last incomplete batch."""
    sizes = [9] * 30 if "order" in data else [40, 21, 9, 17] * 5
    prefixes = [token_file("a", sizes)]
    if not data:
        prefixes.append(token_file("b", [33] * 4))
    config = DataConfig(seq_length=8, train=prefixes, **data)
    total = rows_of_a_pass(config, seed=1234)
    rows = build(train=prefixes, epochs=2, **data)
    length = total // 4 * 4
    assert 0 < len(rows.train) == length <= total
    first = [rows.train.locate(p) for p in range(length)]
    assert len(set(first)) == length
    assert [rows.train.locate(length + p) for p in range(length)] == first
    assert rows.epochs == [1] * len(prefixes)
    assert rows.fingerprint["order"]["kind"].endswith(", pass by pass")
    assert rows.weights == [len(source) / total for source in rows.train.row_sources]


def test_a_source_of_one_row_comes_once_a_pass(token_file):
    prefixes = [token_file("a", [40] * 3), token_file("b", [9])]
    rows = build(train=prefixes, epochs=1, batch_size=1)
    served = [rows.train.locate(place) for place in range(len(rows.train))]
    assert len(served) == rows_of_a_pass(DataConfig(seq_length=8, train=prefixes), seed=1234) == 14
    assert len(set(served)) == 14 and (1, 0) in served
    assert rows.weights == [13 / 14, 1 / 14]
