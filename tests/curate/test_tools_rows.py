"""The rows of steps: viewed, written as ready rows, and those read as a source."""

import json
import pickle
import zlib

import numpy as np
import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.curate.resharding import shard
from castalia.data import (
    DataConfig,
    IndexedDataset,
    IndexedDatasetWriter,
    StepLoader,
    build_rows,
    load_tokenizer,
)
from castalia.data.ready_rows import write_rows
from castalia.stream.viewing import Steps, parse_steps, records, save_ids, step_hash


def rows_for(prefixes, *, steps=5, batch_size=2, seq_length=4, seed=1234, **options):
    config = DataConfig(train=prefixes, seq_length=seq_length, **options)
    return build_rows(
        config, seed=seed, batch_size=batch_size, steps=steps, eval_every=None, eval_batches=1
    )


def served(rows, count):
    return [rows.train[place][0].tolist() for place in range(count)]


@pytest.fixture
def golden(tmp_path):
    """Documents of 5, 3, 7, 2 and 9 tokens with id 100 · document + place."""
    with IndexedDatasetWriter(tmp_path / "golden", np.uint16) as writer:
        for document, size in enumerate([5, 3, 7, 2, 9]):
            writer.add(100 * document + np.arange(size))
    return str(tmp_path / "golden")


def test_written_rows_are_those_that_neox_serves(golden, tmp_path):
    # golden vector: the first rows that GPT-NeoX's own functions give for these sizes, L = 4,
    # seed 1234
    write_rows(rows_for([golden]).train, 0, 10, tmp_path / "ready", {})
    ready = IndexedDataset(tmp_path / "ready")
    assert [row.tolist() for row in ready[:3]] == [
        [205, 206, 400, 401, 402],
        [2, 3, 4, 100, 101],
        [201, 202, 203, 204, 205],
    ]
    assert (len(ready), ready.dtype, set(ready.sizes.tolist())) == (10, np.dtype("u2"), {5})


def test_ready_rows_serve_the_same_run(golden, tmp_path):
    packed = rows_for([golden])
    write_rows(packed.train, 0, 10, tmp_path / "ready", {})
    ready = rows_for([str(tmp_path / "ready")], order="file")
    assert served(ready, 10) == served(packed, 10)
    assert (ready.epochs, ready.tokens, ready.train.seq_length) == ([1], [50], 4)
    batches = [
        next(iter(StepLoader(rows.train, batch_size=2, start_step=3)))[0]
        for rows in (packed, ready)
    ]
    assert batches[0].tokens.tolist() == batches[1].tokens.tolist()
    assert ready.fingerprint["order"]["kind"] != packed.fingerprint["order"]["kind"]


def test_ready_rows_in_shards_and_in_another_process(golden, tmp_path):
    write_rows(rows_for([golden]).train, 0, 10, tmp_path / "ready", {})
    shard(tmp_path / "ready", tmp_path / "cut", size=33)
    ready = rows_for([str(tmp_path / "cut" / "ready")], order="file")
    assert served(ready, 10) == served(rows_for([golden]), 10)
    assert pickle.loads(pickle.dumps(ready.train))[7][0].tolist() == ready.train[7][0].tolist()


def test_ready_rows_begin_again(golden, tmp_path):
    write_rows(rows_for([golden]).train, 0, 3, tmp_path / "ready", {})
    ready = rows_for([str(tmp_path / "ready")], order="file")
    assert ready.epochs == [4]
    assert served(ready, 9) == served(ready, 3) * 3
    assert ready.train.documents_of(4) == (0, [(1, 0, 5)])


def test_ready_rows_of_two_sources(golden, tmp_path):
    for i in range(2):
        write_rows(rows_for([golden], seed=i).train, 0, 4, tmp_path / f"r{i}", {})
    rows = rows_for(
        [str(tmp_path / f"r{i}") for i in range(2)], order="file", weights=[3, 1], steps=10
    )
    picks = [rows.train[place][1] for place in range(20)]
    assert picks.count(0) == 15 and len(rows.train) == 20 and rows.epochs == [4, 2]
    first = [rows.train[place][0].tolist() for place in range(20) if picks[place] == 0]
    assert (
        first[:4]
        == first[4:8]
        == first[8:12]
        == [row.tolist() for row in IndexedDataset(tmp_path / "r0")[:]]
    )


def test_what_are_no_ready_rows(golden, token_file):
    with pytest.raises(
        DataError, match=r"golden: data\.order `file` .* needs items of 5 tokens, but item 1 has 3"
    ):
        rows_for([golden], order="file")
    with pytest.raises(DataError, match="needs rows, but the file is empty"):
        rows_for([token_file("none", [])], order="file")
    with pytest.raises(DataError, match="expected integers"):
        rows_for([token_file("floats", [5], np.float32)], order="file")
    with pytest.raises(
        ValueError, match="split divides documents, but order `file` serves ready rows"
    ):
        DataConfig(train=golden, order="file", split="1,1")


def test_rows_of_sources_of_two_dtypes(golden, tmp_path):
    with IndexedDatasetWriter(tmp_path / "wide", np.int32) as writer:
        writer.add(np.arange(70000, 70040))
    rows = rows_for([golden, str(tmp_path / "wide")])
    write_rows(rows.train, 0, 10, tmp_path / "ready", {})
    assert IndexedDataset(tmp_path / "ready").dtype == np.dtype("<i4")
    assert [row.tolist() for row in IndexedDataset(tmp_path / "ready")[:]] == served(rows, 10)


def test_a_source_is_not_overwritten(golden):
    with pytest.raises(ConfigError, match="would be overwritten"):
        write_rows(rows_for([golden]).train, 0, 2, golden, {})


# view


@pytest.mark.parametrize(
    ("text", "first", "stop"),
    [("0:2", 0, 2), ("3", 3, 4), (":", 0, 5), (":2", 0, 2), ("4:", 4, 5), (" 1 : 5 ", 1, 5)],
)
def test_steps(text, first, stop):
    steps = parse_steps(text, 2, 5)
    assert (steps.first, steps.stop, steps.places) == (first, stop, range(2 * first, 2 * stop))


@pytest.mark.parametrize(
    "text", ["", "a", "1:b", "-1:2", "1:2:3", "2:2", "3:1", "5", "0:6", "1.5", "²"]
)
def test_no_such_steps(text):
    with pytest.raises(ConfigError, match="--steps"):
        parse_steps(text, 2, 5)


def test_ids_are_what_training_takes(golden, tmp_path):
    rows = rows_for([golden])
    assert save_ids(rows.train, Steps(1, 4, 2), tmp_path / "ids.npy") == (6, 5)
    ids = np.load(tmp_path / "ids.npy")
    assert ids.dtype == np.uint16 and ids.tolist() == served(rows, 10)[2:8]
    loader = iter(StepLoader(rows.train, batch_size=2, start_step=1))
    for step in range(3):
        (batch,) = next(loader)
        assert batch.tokens.tolist() == ids[2 * step : 2 * step + 2, :-1].tolist()
        assert step_hash(rows.train, step + 1, 2) == sum(
            zlib.crc32(row.numpy().tobytes()) for row in batch.tokens
        )


def test_ids_that_cannot_be_written_leave_nothing(golden, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CastaliaError, match="cannot write"):
        save_ids(rows_for([golden]).train, Steps(0, 1, 2), tmp_path / "file" / "ids.npy")


def test_records_lead_back_to_the_documents(golden, tmp_path):
    rows = rows_for([golden])
    lines = list(records(rows, Steps(0, 5, 2), None))
    assert [(r["step"], r["row"]) for r in lines] == [(i // 2, i % 2) for i in range(10)]
    dataset = IndexedDataset(golden)
    for record, row in zip(lines, served(rows, 10), strict=True):
        parts = [dataset.get(d["document"], d["start"], d["length"]) for d in record["documents"]]
        assert np.concatenate(parts).tolist() == row and "text" not in record
    assert lines[0]["documents"] == [
        {"document": 2, "start": 5, "length": 2},
        {"document": 4, "start": 0, "length": 3},
    ]
    assert json.loads(json.dumps(lines[0]))["source"] == "golden"


def test_text_of_records(tmp_path):
    bytes_of = load_tokenizer("bytes")
    with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
        for text in ("first text", "second"):
            writer.add([*bytes_of.encode(text), bytes_of.eod_id])
    (record,) = records(
        rows_for([str(tmp_path / "t")], steps=1, batch_size=1, seq_length=17, split="1"),
        Steps(0, 1, 1),
        bytes_of,
    )
    assert sorted(d["text"] for d in record["documents"]) == [
        "first text<|endoftext|>",
        "second<|endoftext|>",
    ]
    assert record["text"] == "".join(d["text"] for d in record["documents"])
