"""The results table: rows stay, newer ones replace older ones, and damage is an error."""

from datetime import datetime, timedelta

import pytest

from castalia.core.errors import DataError
from castalia.results import Result, ResultsStore

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
