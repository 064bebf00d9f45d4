"""Mutated inputs: an error in words or success, never a crash, a hang or wrong data.

Where a mutated file is read, other code must read the same out of it: Python's json, zipfile, tarfile and zlib,
zstandard and pyarrow by themselves, and an .idx taken apart by hand. Some of the mutations run every time, ten
thousand with `-m slow`, in a process of their own, so that a crash of a library is seen as one.
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'")

SCRIPT = r"""
import gzip, io, json, lzma, pathlib, random, signal, struct, sys, tarfile, zipfile
import numpy, pyarrow, zstandard
from pyarrow import parquet
from castalia.core.errors import CastaliaError
from castalia.corpus import prepare, read_documents
from castalia.data import IndexedDataset

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
    if kind == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            archive.writestr("a.txt", texts[0])
            archive.writestr("in/b.jsonl", lines)
        return out.getvalue()
    if kind == "dat.zst":
        return zstandard.compress(b"".join(b"%016d" % len(t.encode()) + t.encode() for t in texts))
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


def json_texts(data):
    found = []
    for i, line in enumerate(data.split(b"\n")):
        text = line.decode("utf-8-sig" if not i else "utf-8")
        if text.strip():
            value = json.loads(text)
            found += value if isinstance(value, list) else [value if isinstance(value, str) else value["text"]]
    return ["\n\n".join(text) if isinstance(text, list) else text for text in found]


def dat_texts(data):
    found = []
    while data:
        size = int(data[:16])
        found.append(data[16 : 16 + size].decode())
        data = data[16 + size :]
    return found


def of_members(members):
    return [text for name, data in members for text in (json_texts(data) if ".json" in name else [data.decode()])]


def by_others(data):
    # the texts as other code reads them
    if kind == "parquet":
        found = parquet.read_table(io.BytesIO(data), use_threads=False, pre_buffer=False)  # no threads at our exit
        return found.column("text").to_pylist()
    if kind == "arrow":
        return pyarrow.ipc.open_stream(data).read_all().column("text").to_pylist()
    if kind == "tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return of_members([(m.name, archive.extractfile(m).read()) for m in archive if m.isreg()])
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return of_members([(m.filename, archive.read(m)) for m in archive.infolist() if not m.is_dir()])
    unpack = {".zst": lambda d: zstandard.ZstdDecompressor().stream_reader(d, read_across_frames=True).read()}
    unpack |= {".gz": gzip.decompress, ".xz": lzma.decompress}
    end = kind[kind.rfind(".") :] if "." in kind else ""
    return (dat_texts if kind == "dat.zst" else json_texts)(unpack.get(end, bytes)(data))


def index_by_hand(index, tokens):
    # sizes and places straight from the bytes
    magic, version, code, count, boundaries = struct.unpack("<9sQBQQ", index[:34])
    width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 4, 7: 8, 8: 2}[code]
    sizes = struct.unpack(f"<{count}i", index[34 : 34 + 4 * count])
    places = struct.unpack(f"<{count}q", index[34 + 4 * count : 34 + 12 * count])
    return [tokens[place : place + size * width] for size, place in zip(sizes, places)]


def whole_index(name):
    prepare([str(folder / "plain.jsonl")], name, "bytes", documents=False)
    good, tokens = open(f"{name}.idx", "rb").read(), open(f"{name}.bin", "rb").read()
    for _ in range(count):
        bad = mutated(good)
        open(f"{name}.idx", "wb").write(bad)
        signal.alarm(20)
        try:
            found = [document.tobytes() for document in IndexedDataset(name)]
            assert found == index_by_hand(bad, tokens)
            told["good"] += 1
        except CastaliaError as error:
            assert "fuzz" in str(error), error
            told["refused"] += 1


def inputs():
    path = folder / f"fuzz.{kind}"
    for turn in range(count):
        data = mutated(original())
        path.write_bytes(data)
        signal.alarm(20)
        try:
            found = list(read_documents([path]))
            assert found == by_others(data)
            told["good"] += 1
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
KINDS = [
    "idx",
    "jsonl",
    "jsonl.zst",
    "jsonl.gz",
    "jsonl.xz",
    "dat.zst",
    "parquet",
    "arrow",
    "tar",
    "zip",
]


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
