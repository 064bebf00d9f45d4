"""Parquet as an input of `prepare`."""

import hashlib
import json
import random
import re
import sys

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import pip_command
from castalia.corpus import prepare, read_documents

pyarrow = pytest.importorskip(
    "pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'"
)
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", "", "zwei ü", *(str(i) * 50 for i in range(3000))]


def texts_of(path, key="text"):
    return list(read_documents([path], key))


@pytest.fixture
def table(tmp_path):
    """table(**columns): a.parquet in row groups of 700, and its path."""

    def write(**columns):
        parquet.write_table(
            pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=700, compression="zstd"
        )
        return tmp_path / "a.parquet"

    return write


def test_texts_in_order(table):
    path = table(id=list(range(len(TEXTS))), text=TEXTS)
    assert texts_of(path) == TEXTS
    assert texts_of(table(body=pyarrow.array(TEXTS, pyarrow.large_string())), key="body") == TEXTS


def test_prepare_and_manifest(table, tmp_path):
    path = table(text=TEXTS)
    heard = []
    done = prepare(
        [path], tmp_path / "out", "bytes", on_progress=lambda read, _: heard.append(read)
    )
    assert done.documents == len(TEXTS) - 1
    (record,) = json.loads((tmp_path / "out.json").read_text())["inputs"]
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(heard) == record["bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"txet": ["x"], "id": [1]},
            r"a\.parquet: unknown column 'text'; columns: id, txet; .*--key; did you mean 'txet'\?",
        ),
        ({"text": [1]}, r"a\.parquet: column 'text' must hold strings, got int64"),
        ({"text": ["x", None]}, r"a\.parquet: row 1: 'text' must be a string, got null"),
        ({"text": ["", ""]}, r"a\.parquet: holds no text"),
    ],
)
def test_wrong_columns(table, columns, message):
    with pytest.raises(DataError, match=message):
        texts_of(table(**columns))


def test_damaged_files(table, tmp_path):
    whole = table(text=TEXTS).read_bytes()
    rng = random.Random(3)
    for data in (b"", b"PAR1", whole[:-9], whole[100:], b"x" * 500):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
            texts_of(tmp_path / "a.parquet")
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            assert len(texts_of(tmp_path / "a.parquet")) <= len(TEXTS)
        except DataError as error:
            assert "a.parquet" in str(error)


def test_without_pyarrow(table, monkeypatch):
    path = table(text=TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigError,
        match=re.escape(f"needs 'pyarrow', which is not installed: {pip_command('parquet')}"),
    ):
        texts_of(path)


def test_texts_that_are_stored_once_each(table):
    assert texts_of(table(text=pyarrow.array(["a", "b", "a", ""]).dictionary_encode())) == [
        "a",
        "b",
        "a",
        "",
    ]
    with pytest.raises(DataError, match="must hold strings, got int64"):
        texts_of(table(text=pyarrow.array([1, 2, 1]).dictionary_encode()))
