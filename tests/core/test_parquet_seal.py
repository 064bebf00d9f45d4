"""The hash of a Parquet file inside itself."""

import random

import pyarrow
import pytest
from pyarrow import parquet

from castalia.core.files import atomic_write
from castalia.core.parquet_seal import parquet_fault, seal, with_place


@pytest.fixture
def table():
    schema = pyarrow.schema({"step": pyarrow.int64(), "name": pyarrow.string()}, {"about": "this"})
    rows = {"step": list(range(50)), "name": [f"row {n}" for n in range(50)]}
    return pyarrow.table(rows, schema=schema)


def test_any_flipped_bit_of_a_sealed_table_is_noticed(table, tmp_path):
    path = tmp_path / "sealed.parquet"
    with atomic_write(path, "wb") as file:
        parquet.write_table(with_place(table), file)
        seal(file)
    assert parquet_fault(path) is None
    assert parquet.read_table(path).to_pylist() == table.to_pylist()
    assert parquet.read_schema(path).metadata[b"about"] == b"this"
    good = path.read_bytes()
    mark = good.rindex(b"sha256:")
    draw = random.Random(1)
    for place in [0, len(good) - 1, mark + 7, *draw.sample(range(len(good)), 100)]:
        if mark <= place < mark + 7:
            continue  # no seal is left, and the rest is whole
        data = bytearray(good)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            noticed = parquet_fault(path) is not None
        except OSError:
            noticed = True
        # A digit of the hash that is none any more: the seal is gone, and nothing else.
        assert noticed or mark <= place < mark + 71, place


def test_a_table_of_an_older_version_is_not_covered(table, tmp_path):
    parquet.write_table(table, tmp_path / "old.parquet")
    assert parquet_fault(tmp_path / "old.parquet") is None
