"""The results table: rows stay, newer ones replace older ones, and damage is an error."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest

from castalia.core.errors import CastaliaError, DataError
from castalia.results import COLUMNS, Result, ResultsStore, find_stores, query_stores
from castalia.results.formats import as_json

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("duckdb")

THEN = datetime(2026, 1, 2, 3, 4, 5)


def row(value: float, step: int = 1, when: datetime | None = THEN, **more) -> Result:
    return Result("s", "m", "piqa", "acc", value, step=step, evaluated_at=when, **more)


def test_rows_come_back_and_the_newest_of_a_key_stands(tmp_path):
    store = ResultsStore(tmp_path / "store")
    assert store.query("select count(*) from results") == (["count_star()"], [(0,)])
    assert store.add([row(0.5), row(0.6, step=2, shots=5)]) == 2
    assert store.add([row(0.7, when=THEN + timedelta(1)), row(0.1, 2, shots=5, dtype="bf16")]) == 3
    store.add([row(0.9, when=THEN - timedelta(1))])
    store.add([row(0.8, when=None)])
    names, rows = store.query("select step, value, dtype from results where step = ?", [1])
    assert names == ["step", "value", "dtype"] and rows == [(1, 0.7, None)]


def test_a_damaged_file_is_an_error_and_stays(tmp_path):
    store = ResultsStore(tmp_path)
    store.add([row(float(i), step=i) for i in range(2000)])
    good = store.path.read_bytes()
    for damaged in (b"PAR1 no", good[: len(good) // 2], flipped(good, len(good) // 3)):
        store.path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"results\.parquet cannot be read as Parquet: .+; move"
        ):
            store.add([row(1.0)])
        assert store.path.read_bytes() == damaged
    with pytest.raises(DataError, match="nowhere"):
        ResultsStore(tmp_path / "new").query("select nowhere from results")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


ODD = [
    row(math.nan, 1),
    row(math.inf, 2),
    row(-math.inf, 3),
    row(5e-324, 4, stderr=-0.0, tokens=2**63 - 1, parameters=-(2**63), shots=2**31 - 1),
    row(0.1 + 0.2, 5, source="ü🙂\u2028\x00'\"\\ |\n", task_hash=""),
    row(1.0, 6, when=datetime(1, 1, 1), higher_is_better=False),
    row(1.0, 7, when=datetime(9999, 12, 31, 23, 59, 59, 999999), higher_is_better=True),
    row(1.0, 8, checkpoint="long " * 200_000),
]


def test_values_are_exact_after_every_way_through_the_table(tmp_path):
    store = ResultsStore(tmp_path)
    store.add(ODD)
    names, values = store.query("select * from results order by step")
    assert names == list(COLUMNS) and len(values) == len(ODD)
    for expected, got in zip(ODD, values, strict=True):
        again = Result(**dict(zip(names, got, strict=True)))
        assert repr(again) == repr(expected)
    # A second table of it, with another row that rewrites all of it, is the same.
    other = ResultsStore(tmp_path / "other.parquet")
    other.merge(store.table())
    other.add([row(2.0, 100)])
    assert repr(other.query("select * from results where step < 100 order by step")[1]) == repr(
        values
    )
    assert repr(other.query("from results order by step limit 1")) == repr((names, values[:1]))


def test_the_same_rows_again_write_nothing(tmp_path):
    store = ResultsStore(tmp_path)
    rows = [row(0.5, step) for step in range(50)]
    store.add(rows)
    before = os.stat(store.path)
    assert store.add(rows) == store.add(rows[7:9]) == 50
    assert os.stat(store.path).st_ino == before.st_ino
    # A newer one takes the place of the older one, and the others keep theirs.
    assert store.add([row(0.75, 3, when=None), row(0.25, 4, when=THEN + timedelta(1))]) == 50
    values = store.query("select value from results where step < 6 order by step")[1]
    assert [value for (value,) in values] == [0.5, 0.5, 0.5, 0.5, 0.25, 0.5]


def test_a_table_of_another_version(tmp_path):
    store = ResultsStore(tmp_path)
    store.add([row(float(step), step, shots=0) for step in range(3)])
    plain = store.table()
    # An older one has fewer columns; they are unknown, or what they always were.
    parquet.write_table(plain.drop_columns(["shots", "filter", "checkpoint_hash"]), store.path)
    store.add([row(9.0, 9, shots=5)])
    got = store.query("select step, shots, filter, value from results order by step")[1]
    assert got == [
        (0, None, "none", 0),
        (1, None, "none", 1),
        (2, None, "none", 2),
        (9, 5, "none", 9),
    ]
    # A newer one has more; they stay, unknown for the new rows.
    more = plain.append_column("judge", [["x", "y", "z"]]).append_column("rounds", [[1, 2, 3]])
    parquet.write_table(more, store.path)
    assert store.add([row(9.0, 9)]) == 4 and store.table().column_names == list(COLUMNS)
    written = parquet.read_table(store.path).sort_by("step")
    assert written["judge"].to_pylist() == ["x", "y", "z", None]
    assert written["rounds"].to_pylist() == [1, 2, 3, None]
    # Another type, or another table.
    step = more.schema.get_field_index("step")
    parquet.write_table(more.set_column(step, "step", [["a", "b", "c"]]), store.path)
    with pytest.raises(DataError, match="column step: expected int64, got string"):
        store.query("select 1 from results")
    parquet.write_table(arrow.table({"suite": ["x"], "step": [1]}), store.path)
    with pytest.raises(DataError, match="is no results table: it lacks the columns model, task"):
        store.add([row(1.0)])


def test_a_full_disk_keeps_the_old_table(tmp_path):
    store = ResultsStore(tmp_path)
    store.add([row(0.5)])
    before = store.path.read_bytes()
    rows = [row(math.sqrt(step), step, source=str(math.sin(step))) for step in range(2000)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(
            CastaliaError, match=r"cannot write .*results\.parquet: File too large; free"
        ):
            store.add(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
    assert store.add(rows) == 2000


WORKER = """
import os, signal, sys
from castalia.results import Result, ResultsStore
folder, name, killed = sys.argv[1:]
if killed == "yes":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for step in range(6):
    ResultsStore(folder).add([Result("s", name, "piqa", "acc", 0.5, step=step)])
"""


def test_processes_add_at_once_and_one_is_killed(tmp_path):
    store = ResultsStore(tmp_path)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path, name, killed],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, killed in (("worker", "no"), ("killed", "yes"))
    ]
    steps = 0
    while any(worker.poll() is None for worker in workers):
        steps += 1
        store.add([row(0.5, steps)])
        time.sleep(0.05)
    errors = [worker.communicate(timeout=200)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL], errors
    found = store.query("select model, count(*) from results group by model order by model")[1]
    assert found == [("m", steps), ("worker", 6)]
    store.add([row(0.5, 0)])
    # What the killed one left is gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".claim", "results.parquet"]


def test_stores_of_runs_and_suites(tmp_path):
    for place in ("suite/evals", "suite/a/evals", "suite/b/evals"):
        ResultsStore(tmp_path / place).add([row(0.5, len(place)), row(0.25, 0)])
    suite = tmp_path / "suite"
    assert [store.folder for store in find_stores(suite)] == [
        suite / "evals",
        suite / "a" / "evals",
        suite / "b" / "evals",
    ]
    assert [store.folder for store in find_stores(suite / "a")] == [suite / "a" / "evals"]
    file = suite / "a" / "evals" / "results.parquet"
    assert [store.path for store in find_stores(file)] == [file]
    counted = query_stores(
        find_stores(suite), "select step, count(*) from results group by 1 order by 1"
    )
    assert counted[1] == [(0, 1), (11, 1), (13, 1)]
    with pytest.raises(DataError, match="nothing: no results here: expected a folder with results"):
        find_stores(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("delete from results", "expected one SELECT, got DELETE"),
        ("copy results to 'x.csv'", "expected one SELECT, got COPY"),
        ("set lock_configuration = false", "expected one SELECT, got SET"),
        ("select 1; drop table results", "expected one SELECT, got SELECT, DROP"),
        ("", "expected one SELECT, got none"),
        ("select * from read_csv('{file}')", "file system operations are disabled"),
        ("select * from '{file}'", "does not exist"),
        ("select * from rows", "Table with name rows does not exist"),
        ("select nothing from results", "nothing"),
        ("selct 1", "syntax error"),
        ("select 1 from results where step = ?", "parameter"),
    ],
)
def test_sql_reads_the_table_and_nothing_else(tmp_path, sql, message):
    store = ResultsStore(tmp_path)
    rows = [row(0.5)]
    store.add(rows)
    with pytest.raises(DataError, match=f"SQL: .*{message}"):
        store.query(sql.format(file=__file__))


def test_queries_of_several_kinds(tmp_path):
    store = ResultsStore(tmp_path)
    store.add([row(0.5, step, shots=step % 2) for step in range(4)])
    pivot = (
        "pivot (select step, shots, value from results) on shots using any_value(value) order by 1"
    )
    assert store.query(pivot) == (
        ["step", "0", "1"],
        [(0, 0.5, None), (1, None, 0.5), (2, 0.5, None), (3, None, 0.5)],
    )
    assert len(store.query("describe results")[1]) == len(COLUMNS)
    with_values = store.query("with x as (from results) select count(*) from x where step > ?", [1])
    assert with_values[1] == [(2,)]


def test_columns_of_one_name_are_keys_of_their_own_in_json():
    text = as_json(["a", "a", "a_1", "a"], [(1, 2, 3, 4)])
    assert json.loads(text) == [{"a": 1, "a_2": 2, "a_1": 3, "a_3": 4}]
