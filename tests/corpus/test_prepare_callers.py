"""What is asked of `prepare` in odd ways, and what is said at its end of what is not there."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.corpus.options import PrepareOptions
from castalia.corpus.provenance import OWN, read_provenance
from castalia.corpus.work_folder import WorkFolder
from castalia.curate.joining import merge
from castalia.curate.verify import verify
from castalia.data import DataConfig, IndexedDataset, PairwiseDataset


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"text": f"document {i}", "id": i} for i in range(9))))
    return path


def test_a_script_on_standard_input_may_have_workers(corpus, tmp_path):
    script = (
        "from castalia.corpus import prepare\n"
        f"print(prepare([{str(corpus)!r}], 'x', 'bytes', workers=2).documents)"
    )
    job = subprocess.run(
        [sys.executable, "-"],
        input=script,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (job.returncode, job.stdout) == (0, "9\n"), job.stderr


def test_one_input_needs_no_list(corpus, tmp_path):
    for one in (corpus, str(corpus), iter([corpus])):
        assert prepare(one, tmp_path / "x", "bytes", overwrite=True).documents == 9
    assert merge(str(tmp_path / "x"), tmp_path / "y")["documents"] == 9
    assert all(check.ok for check in verify(str(tmp_path / "y")))


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"workers": 0}, "--workers 0: expected an integer of at least 1"),
        ({"workers": "2"}, "--workers '2': expected an integer"),
        ({"max_documents": -3}, "--num-docs -3: expected an integer"),
        ({"max_documents": 2.5}, "--num-docs 2.5: expected an integer"),
        ({"part_bytes": 0}, "part_bytes 0: expected an integer"),
        ({"keys": "text"}, "keys 'text': expected a sequence of names"),
        ({"keep": "id"}, "keep 'id': expected a sequence of names"),
        ({"keep": ("id", "m", "id")}, "--keep id, m, id: a name is repeated"),
        ({"keys": ()}, "--key: name the key of the text"),
        ({"shard": "0/2"}, "shard '0/2': expected two integers"),
        ({"shard": (0, 0)}, "--shard 0/0: expected at least one share"),
        ({"address": "head:6379"}, "--address head:6379 needs --engine ray"),
        ({"options": PrepareOptions(), "append_eod": True}, "append_eod: set these in `options`"),
    ],
)
def test_choices_that_mean_nothing_are_refused(corpus, tmp_path, choices, said):
    with pytest.raises(ConfigError, match="^" + said):
        prepare([corpus], tmp_path / "x", "bytes", **choices)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_input_without_a_name_is_not_the_current_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="an input has an empty name"):
        prepare([corpus, ""], tmp_path / "x", "bytes")


def test_the_first_reject_is_named_where_nothing_else_came(corpus, tmp_path):
    with pytest.raises(
        DataError,
        match=r"no documents with text in .*; 9 rejected, the first: .*a\.jsonl:1: .*the key 'b'",
    ):
        prepare([corpus], tmp_path / "x", "bytes", keys=("b",), reject=True)


def test_what_is_lost_of_a_file_that_is_cut_off_is_told(corpus, tmp_path):
    packed = gzip.compress(corpus.read_bytes() * 500)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    (tmp_path / "bad.jsonl").write_bytes(lines({"text": '"line": null'}, {"t": '"line": null'}))
    with pytest.warns(
        UserWarning,
        match=r"1 of the inputs could not be read to the end.*cut\.jsonl\.gz: cannot be",
    ):
        done = prepare([corpus, cut, tmp_path / "bad.jsonl"], tmp_path / "x", "bytes", reject=True)
    assert (done.rejected, len(done.unread)) == (2, 1)
    assert json.loads((tmp_path / "x.json").read_text())["unread"] == list(done.unread)
    assert "unread" not in json.loads(write_whole(corpus, tmp_path).read_text())


def write_whole(corpus, tmp_path):
    prepare([corpus], tmp_path / "whole", "bytes", reject=True)
    return tmp_path / "whole.json"


def test_metadata_that_no_document_has_is_told(corpus, tmp_path):
    pytest.importorskip(
        "pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'"
    )
    with pytest.warns(UserWarning, match="^--keep names 'meta', which no document has"):
        prepare([corpus], tmp_path / "x", "bytes", keep=("id", "meta"))


def test_metadata_of_any_name_is_kept(tmp_path):
    pytest.importorskip(
        "pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'"
    )
    names = ["piece", "text", "a b", "ü", "a.b", "0", "__index_level_0__"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x"}, dict.fromkeys(names, "here") | {"id": [1, {"a": None}]}))
    prepare(path, tmp_path / "x", "bytes", keep=tuple(names), reject=True)
    entry = read_provenance(str(tmp_path / "x"), 1)
    assert {name: entry[name] for name in (*names, "id")} == dict.fromkeys(names, "here") | {
        "id": '[1, {"a": null}]'
    }
    assert set(entry) == {*OWN, *names, "id"}


def test_a_tokenizer_is_trained_on_what_is_not_rejected(tmp_path):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_bytes(lines({"text": "the cat the cat"}) * 9)
    bad.write_bytes(b"{broken\n" + good.read_bytes() + b'{"text": "\\ud800"}\n')
    prepare(good, tmp_path / "x", tmp_path / "good.json", train_vocab=262)
    assert (
        prepare(bad, tmp_path / "y", tmp_path / "bad.json", train_vocab=262, reject=True).rejected
        == 2
    )
    assert (tmp_path / "bad.json").read_bytes() == (tmp_path / "good.json").read_bytes()
    with pytest.raises(DataError, match=r"b\.jsonl:1: invalid JSON"):
        prepare(bad, tmp_path / "y", tmp_path / "other.json", train_vocab=262)


@pytest.mark.parametrize("size", [40, 1 << 20])
@pytest.mark.parametrize("rows", [None, 2, 7, 8])
def test_what_a_stopped_job_of_fewer_documents_left_is_not_taken_for_all(
    corpus, tmp_path, monkeypatch, size, rows
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(WorkFolder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "x", "bytes", max_documents=5, part_bytes=size)
    assert prepare(
        corpus, tmp_path / "x", "bytes", max_documents=rows, part_bytes=size
    ).documents == (rows or 9)
    prepare(corpus, tmp_path / "y", "bytes", max_documents=rows, part_bytes=size)
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "y.bin").read_bytes()
    assert all(check.ok for check in verify(tmp_path / "x"))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_stopped_job_of_more_inputs_left_is_not_in_the_output(
    corpus, tmp_path, monkeypatch, workers
):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "b.txt").write_bytes(b"x" * 50)
    keep = {"part_bytes": 40, "workers": workers, "keep": ("id",)}
    with monkeypatch.context() as changed:
        changed.setattr(WorkFolder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus, tmp_path / "b.txt"], tmp_path / "x", "bytes", **keep)
    prepare(corpus, tmp_path / "x", "bytes", **keep)
    prepare(corpus, tmp_path / "y", "bytes", **keep)
    for suffix in (".bin", ".idx", ".documents.parquet"):
        assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"y{suffix}").read_bytes()
    assert all(check.ok for check in verify(tmp_path / "x"))


@pytest.mark.parametrize("workers", [1, 2])
def test_pairs_of_which_a_side_is_empty_are_told_and_refused(tmp_path, workers):
    path, config = tmp_path / "p.jsonl", DataConfig(seq_length=8, packing="unpacked")
    sides = [str(tmp_path / f"x_{key}_document") for key in "cr"]
    path.write_bytes(
        lines(
            {"c": "", "r": "r0"}, {"c": "c1", "r": ""}, {"c": "c2", "r": "r2"}, {"c": "", "r": ""}
        )
    )
    with pytest.warns(
        UserWarning, match="^2 documents have text under some keys and none under others"
    ):
        done = prepare(
            [path], tmp_path / "x", "bytes", keys=("c", "r"), workers=workers, part_bytes=20
        )
    assert (done.uneven, [len(IndexedDataset(side)) for side in sides]) == (2, [2, 2])
    with pytest.raises(
        DataError, match="2 documents had a text under one key and none under another"
    ):
        PairwiseDataset(*sides, config, num_samples=3, seed=1)
    path.write_bytes(lines({"c": "c1", "r": "r1"}, {"c": "", "r": ""}, {"c": "c2", "r": "r2"}))
    again = {"keys": ("c", "r"), "workers": workers, "overwrite": True}
    assert prepare([path], tmp_path / "x", "bytes", **again).uneven == 0
    assert len(PairwiseDataset(*sides, config, num_samples=2, seed=1)) >= 2
    assert all(check.ok for check in verify(sides))


def test_json_over_several_lines_is_told_what_a_line_is(tmp_path):
    path = Path(tmp_path / "a.json")
    path.write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(
        DataError,
        match=r"invalid JSON at column 2: .*; put each document on a line of its own",
    ):
        prepare(path, tmp_path / "x", "bytes")


def test_a_file_of_columns_that_cannot_be_read_counts_once(corpus, tmp_path):
    """Each of its stretches says so, and how many there are depends on how the job is cut."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'castalia[parquet]'")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(
        pyarrow.table({"text": list(range(3000))}), tmp_path / "n.parquet", row_group_size=100
    )
    with pytest.warns(UserWarning, match=r"^1 of the inputs could not be read"):
        done = prepare(
            [corpus, tmp_path / "n.parquet"], tmp_path / "x", "bytes", reject=True, part_bytes=2000
        )
    assert done.rejected > 1
    assert done.unread == (f"{tmp_path / 'n.parquet'}: column 'text' must hold strings, got int64",)
