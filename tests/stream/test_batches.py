"""The batches of a run: the rows that training hashed, in every form, whole or continued."""

import json
import pickle
import re
import shutil
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

import castalia
from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.core.log_lines import read_log
from castalia.data import IndexedDataset, IndexedDatasetWriter
from castalia.stream.batches import hash_group, save_batches, verify_batches
from castalia.stream.batches_lines import custom_batches
from castalia.stream.batches_rows import (
    lines_to_file,
    parquet_batches,
    row_records,
    text_of,
)
from castalia.stream.opening import open_stream
from castalia.stream.processes import begin, do, in_processes

SMALL = (
    "model.num_layers=1 model.hidden_size=32 data.seq_length=16 train.batch_size=4"
    " train.log_every=9 train.steps=5 checkpoint.every=9 checkpoint.steps=[]"
)
KINDS = {
    "growing": [
        "data.train=[A,B]",
        "data.weights=[3,1]",
        "train.batch_ramp=[2,1,6]",
        "curriculum.kind=linear",
        "curriculum.shortest=8",
        "curriculum.steps=4",
    ],
    "best_fit": [
        "data.train=[A,B]",
        "data.packing=best_fit",
        "data.fim_rate=0.5",
        "data.fim_tokens=[1,2,3]",
    ],
    "mixed": ["data.train=[A,B]", "mixing.kind=odm", "data.packing=unpacked"],
    "pairs": ["data.chosen=[A]", "data.rejected=[B]", "loss.kind=dpo", "data.packing=unpacked"],
    "ready": [
        "data.train=[R]",
        "data.order=file",
        "data.interventions=[{kind: swap, level: tokens, terms: [[97, 98]], start: 1, stop: 3}]",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with token files A and B of as many short documents, and R of ready rows."""
    folder = tmp_path_factory.mktemp("batches")
    random = np.random.default_rng(1)
    sizes = random.integers(3, 16, 60)
    for name, lengths in (("A", sizes), ("B", sizes), ("R", [17] * 20)):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for size in lengths:
                writer.add(random.integers(97, 123, size))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """trained(kind): the stream of a run of that kind."""
    streams = {}

    def run(kind):
        if kind not in streams:
            words = [re.sub(r"\b([ABR])(?=[\],])", rf"{folder}/\1", word) for word in KINDS[kind]]
            output = str(folder / kind)
            castalia.train("debug", *SMALL.split(), *words, output=output)
            streams[kind] = open_stream(output)
        return streams[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_that_training_hashed(trained, kind):
    stream = trained(kind)
    assert verify_batches(stream, range(5)) == 5
    for rows in stream.batches(range(5)):
        whole = [stream.rows.train[place][0].tolist() for place in rows.block.places]
        assert rows.block.tokens.tolist() == whole
        assert rows.seen.tokens.tolist() == [row[: rows.length + 1] for row in whole]


def test_other_rows_than_those_of_the_run_are_found(trained, tmp_path):
    stream = trained("best_fit")
    lines = [line.text.decode() for line in read_log(stream.folder / "metrics.jsonl")]
    path = tmp_path / "metrics.jsonl"
    other = lines[2].replace('"rows_hash": ', '"rows_hash": 1')
    path.write_text("\n".join([*lines[:2], other, *lines[3:]]))
    with pytest.raises(DataError, match=r"step 2: the rows have the hash .*; its data or"):
        verify_batches(replace(stream, folder=tmp_path), range(5))
    # A line whose checksum says that it was changed is no witness.
    text = (stream.folder / "metrics.jsonl").read_text()
    path.write_text(text.replace('"step": 3, ', '"step": 7, '))
    with (
        pytest.warns(UserWarning, match=r"line 3 is damaged"),
        pytest.raises(DataError, match=r"no rows_hash of step 2"),
    ):
        verify_batches(replace(stream, folder=tmp_path), range(5))
    with pytest.raises(ConfigError, match="--verify compares with the metrics"):
        verify_batches(replace(stream, folder=None), range(5))


def test_numpy_files_as_the_old_viewer_wrote_them(trained, tmp_path):
    stream = trained("growing")
    assert save_batches(stream, range(4), tmp_path) == (4, 0, 11)
    names = sorted(path.name for path in tmp_path.glob("*.npy"))
    assert names == [f"batch{step}_bs{size}.npy" for step, size in enumerate([2, 2, 3, 4])]
    loaded = np.load(tmp_path / "batch3_bs4.npy")
    assert loaded.dtype == np.int64 and loaded.shape == (4, 17)
    assert np.load(tmp_path / names[0]).shape == (2, 9)  # the curriculum's first rows
    # What a killed job left: a step missing, and a file half written.
    (tmp_path / names[1]).unlink()
    (tmp_path / ".batch1_bs2.npy.abc.tmp").write_bytes(b"half")
    kept = (tmp_path / names[2]).stat().st_ino
    assert save_batches(stream, range(5), tmp_path) == (2, 3, 6)
    assert (tmp_path / names[2]).stat().st_ino == kept
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("*.npy"))) == 5
    # What a power cut left: a name whose bytes had not reached the disk.
    whole = (tmp_path / names[3]).read_bytes()
    for left in (b"", whole[:-8]):
        (tmp_path / names[3]).write_bytes(left)
        assert save_batches(stream, range(5), tmp_path) == (1, 4, 4)
        assert (tmp_path / names[3]).read_bytes() == whole


def test_a_folder_of_another_run_is_refused(trained, tmp_path):
    save_batches(trained("growing"), range(1), tmp_path)
    with pytest.raises(ConfigError, match=r"belongs to another job \(rows.*--overwrite"):
        save_batches(trained("best_fit"), range(1), tmp_path)
    save_batches(trained("best_fit"), range(2), tmp_path, overwrite=True)
    assert np.load(tmp_path / "batch0_bs4.npy").shape == (4, 17)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    (tmp_path / "_batches.json").unlink()
    with pytest.raises(ConfigError, match="is not of castalia batches, or lacks"):
        save_batches(trained("best_fit"), range(1), tmp_path)


def test_a_worker_reads_the_same_rows(trained):
    # Mixed: it plans the steps again.
    stream = trained("mixed")
    here = hash_group(stream, range(1, 5))
    begin(pickle.loads(pickle.dumps((stream, hash_group))))
    assert do(range(3, 5)) == here[2:] and do(range(1, 4)) == here[:3]
    with closing(in_processes(stream, hash_group, [range(2), range(2, 5)])) as found:
        assert [pair for group in found for pair in group][1:] == here


FUNCTIONS = """
import numpy as np

def counts(batch, step):
    first = np.bincount(batch[:, 0] - 97)
    return {"mean": batch.mean(), "first": first[:3], "nan": np.float32("nan")}

def sources(batch, step, block):
    return {"sources": block.source, "documents": len(block.table.documents), "step": 7}

def fails(batch, step):
    return {"rows": len(batch)} if step < 3 else {"rows": 1 / 0}

def no_dict(batch, step):
    return len(batch)

def no_json(batch, step):
    return {"what": {1, 2}}
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Name of a module of functions, importable from the working directory."""
    (tmp_path / "functions_of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield "functions_of_a_test"
    sys.modules.pop("functions_of_a_test", None)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_function_gets_every_batch_and_every_record_is_kept(trained, functions, tmp_path):
    stream = trained("growing")
    path = tmp_path / "stats.jsonl"
    assert custom_batches(stream, range(2), f"{functions}:counts", path) == (2, 0, 4)
    # A longer range goes on behind the shorter one, and behind a line that a crash cut off.
    path.rename(tmp_path / "stats.jsonl.partial")
    with open(tmp_path / "stats.jsonl.partial", "a") as file:
        file.write('{"step": 2, "me')
    assert custom_batches(stream, range(5), f"{functions}:counts", path) == (3, 2, 11)
    found = read(path)
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4]
    for record, rows in zip(found, stream.batches(range(5)), strict=True):
        assert record["mean"] == rows.seen.tokens.mean() and record["nan"] is None
    assert custom_batches(stream, range(5), f"{functions}:counts", path) == (0, 5, 0)
    with pytest.raises(ConfigError, match=r"stats.jsonl has steps up to 4, and steps up to 2 are"):
        custom_batches(stream, range(3), f"{functions}:counts", path)
    assert len(read(path)) == 5
    with pytest.raises(ConfigError, match=r"another job \(function: see"):
        custom_batches(stream, range(5), f"{functions}:sources", path)
    with open(tmp_path / f"{functions}.py", "a") as file:
        file.write("LIMIT = 3  # what a function reads is as good as its own text\n")
    with pytest.raises(ConfigError, match=r"another job \(source: see"):
        custom_batches(stream, range(5), f"{functions}:counts", path)
    custom_batches(stream, range(5), f"{functions}:sources", path, overwrite=True)
    assert read(path)[1]["sources"] == list(stream.block(range(2, 4)).source)


def test_a_function_that_fails_is_shown_with_its_step(trained, functions, tmp_path):
    stream = trained("growing")
    path = tmp_path / "stats.jsonl"
    text = r"--fn functions_of_a_test:fails, step 3: ZeroDivisionError: .* \(.*functions_of.*:12\)"
    with pytest.raises(ConfigError, match=text):
        custom_batches(stream, range(5), f"{functions}:fails", path)
    assert not path.exists() and len(read(tmp_path / "stats.jsonl.partial")) == 3
    for name, says in (
        ("no_dict", "step 0: returned int, expected a dict"),
        ("no_json", "step 0: JSON cannot hold set {1, 2}"),
        ("cuonts", "has no function 'cuonts'; did you mean 'counts'"),
    ):
        with pytest.raises(ConfigError, match=says):
            custom_batches(stream, range(5), f"{functions}:{name}", tmp_path / f"{name}.jsonl")


def test_rows_as_lines_and_as_text(four_steps, tmp_path):
    stream = open_stream(str(four_steps))
    tokenizer = stream.tokenizer_for("text")
    records = list(row_records(stream, range(1, 4), tokenizer))
    assert [(record["step"], record["row"]) for record in records] == [
        (step, row) for step in (1, 2, 3) for row in (0, 1)
    ]
    path = tmp_path / "rows.jsonl"
    lines_to_file(stream, range(1, 4), tokenizer, path)
    assert read(path) == records
    # Killed within step 2: what is whole stays, and its other row follows.
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl.partial").write_text("".join(lines[:3]) + lines[3][:20])
    path.unlink()
    assert lines_to_file(stream, range(1, 4), tokenizer, path) == (2, 1, 3)
    assert read(path) == records
    text = text_of(records[0])
    document = records[0]["documents"][0]
    assert text.startswith("step 1, row 0, source stdlib\n-- document ")
    assert document["text"].strip() in text and "stdlib.jsonl:" in text


def test_rows_of_a_curriculum_are_shown_as_the_step_saw_them(trained):
    stream = trained("growing")
    for record in row_records(stream, range(1), None):
        assert sum(document["length"] for document in record["documents"]) == 9


@pytest.mark.parametrize("per", ["row", "span"])
def test_tables_lead_back_to_the_tokens(trained, tmp_path, per):
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = trained("growing")
    assert parquet_batches(stream, range(5), tmp_path / "t.parquet", per=per) == (5, 0, 15)
    lines = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    files = [IndexedDataset(source.dataset.prefix) for source in stream.rows.train.row_sources]
    found: dict[int, list[int]] = {}
    for line in lines:
        spans = [(line["document"], line["start"], line["length"])]
        if per == "row":
            spans = zip(*spans[0], strict=True)
        tokens = files[stream.sources.index(line["source"])]
        ids = np.concatenate([tokens.get(*span) for span in spans]).tolist()
        assert ids == line["tokens"]
        found.setdefault(line["place"], []).extend(ids)
        assert stream.step_of(line["place"]) == (line["step"], line["row"])
    rows = [row.tolist() for step in stream.batches(range(5)) for row in step.seen.tokens]
    assert list(found.values()) == rows


def test_a_folder_of_tables_is_continued(trained, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("castalia.stream.batches_rows.ROWS_OF_FILE", 8)
    stream = trained("best_fit")
    assert parquet_batches(stream, range(5), tmp_path) == (5, 0, 20)
    names = sorted(path.name for path in tmp_path.glob("*.parquet"))
    assert names[0] == "steps-00000000-00000001.parquet" and len(names) == 3
    whole = parquet.read_table(tmp_path).to_pylist()
    (tmp_path / names[1]).unlink()
    assert parquet_batches(stream, range(5), tmp_path) == (2, 3, 8)
    assert parquet.read_table(tmp_path).to_pylist() == whole
    with pytest.raises(ConfigError, match=r"another job \(steps"):
        parquet_batches(stream, range(4), tmp_path)


def test_a_mixed_run_has_no_rows_ahead(trained, tmp_path):
    folder = trained("mixed").folder
    longer = open_stream([str(folder), "train.steps=8"])
    with pytest.raises(ConfigError, match=r"step 5: not trained yet.*its mixer chooses the rows"):
        longer.places(5, 6, planned=True)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "mixture.jsonl").unlink()
    with pytest.raises(CastaliaError, match=r"mixture\.jsonl"):
        open_stream(str(copy))
