"""Mutated inputs: an error in words or success, never a crash, a hang or wrong data.

Some of the mutations run every time, ten thousand with `-m slow`. They run in a process of their own, so that
a crash of a library is seen as one.
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'")

SCRIPT = r"""
import gzip, io, json, lzma, pathlib, random, signal, sys, tarfile
import numpy, pyarrow, zstandard
from pyarrow import parquet
from castalia.core.errors import CastaliaError
from castalia.data import IndexedDataset, prepare, read_documents

kind, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
draw = random.Random(seed)
texts = [f"document {i} äß中 " + "ab\n" * draw.randrange(30) for i in range(60)]
lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()
columns = pyarrow.table({"text": texts, "id": list(range(60))})


def original():
    if kind == "parquet":
        out = io.BytesIO()
        parquet.write_table(columns, out, row_group_size=7, compression=draw.choice(["zstd", "none", "snappy"]))
        return out.getvalue()
    if kind == "arrow":
        out = io.BytesIO()
        with pyarrow.ipc.new_stream(out, columns.schema) as writer:
            writer.write_table(columns, max_chunksize=9)
        return out.getvalue()
    if kind == "tar":
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, data in (("a.txt", texts[0].encode()), ("in/b.jsonl", lines)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()
    pack = {"jsonl": bytes, "jsonl.zst": zstandard.compress, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}
    return pack[kind](lines)


def mutated(data):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        place, what = draw.randrange(len(data)), draw.randrange(5)
        if what == 0:
            data[place] = draw.randrange(256)
        elif what == 1:
            data[place] ^= 1 << draw.randrange(8)
        elif what == 2:
            del data[place:]
        elif what == 3:
            del data[place : place + draw.randrange(1, 40)]
        else:
            data[place:place] = data[draw.randrange(len(data)) :][: draw.randrange(1, 40)]
        if not data:
            break
    return bytes(data)


def whole_index(name):
    # an .idx: every document it then gives lies within the .bin
    prepare([str(folder / "plain.jsonl")], name, "bytes", documents=False)
    good = open(f"{name}.idx", "rb").read()
    for _ in range(count):
        open(f"{name}.idx", "wb").write(mutated(good))
        signal.alarm(20)
        try:
            found = IndexedDataset(name)
            total = sum(int(document.sum()) for document in found)
            told["good"] += total >= 0
        except CastaliaError as error:
            assert "fuzz" in str(error), error
            told["refused"] += 1


def inputs():
    path = folder / f"fuzz.{kind}"
    known = {*texts}
    for turn in range(count):
        path.write_bytes(mutated(original()))
        signal.alarm(20)
        try:
            found = list(read_documents([path]))
            assert all(isinstance(text, str) for text in found)
            told["good"] += 1
            if kind in ("jsonl.gz", "jsonl.zst", "jsonl.xz"):  # these carry a hash of their content, mostly
                told["same"] = told.get("same", 0) + (set(found) <= known)
        except CastaliaError as error:
            assert "fuzz" in str(error), error
            told["refused"] += 1
        if turn % 50 == 0:
            signal.alarm(40)
            try:
                done = prepare([path], folder / "out", "bytes", reject=True, part_bytes=500)
                assert done.documents == len(IndexedDataset(folder / "out"))
            except CastaliaError as error:
                assert "fuzz" in str(error), error


told = {"good": 0, "refused": 0}
(folder / "plain.jsonl").write_bytes(lines)
whole_index(str(folder / "fuzz")) if kind == "idx" else inputs()
signal.alarm(0)
print(json.dumps(told))
"""
KINDS = ["idx", "jsonl", "jsonl.zst", "jsonl.gz", "jsonl.xz", "parquet", "arrow", "tar"]


def mutate(kind, count, folder):
    """Counts of mutations read and refused; fails if the process crashed, hung or raised anything else."""
    command = [sys.executable, "-c", SCRIPT, kind, str(count), "7", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["good"] + found["refused"] == count
    assert found["refused"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutations(kind, tmp_path):
    mutate(kind, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(kind, tmp_path):
    mutate(kind, 10_000 // len(KINDS), tmp_path)
