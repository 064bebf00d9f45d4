"""Mutated inputs: an error in words or success, never a crash, a hang or wrong data.

Where a mutated file is read, other code must read the same from it: Python's json, zipfile, tarfile
and zlib, zstandard and pyarrow by themselves, and an .idx parsed by hand. Some mutations run every
time, ten thousand with `-m slow`, in a process of their own: so a crash of a library is noticed.
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

kind = sys.argv[1]
count = int(sys.argv[2])
seed = int(sys.argv[3])
folder = pathlib.Path(sys.argv[4])
draw = random.Random(seed)
texts = [f"document {i} äß中 " + "ab\n" * draw.randrange(30) for i in range(60)]
lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()
columns = pyarrow.table({"text": texts, "id": list(range(60))})


def original():
    if kind == "parquet":
        out = io.BytesIO()
        compression = draw.choice(["zstd", "none", "snappy"])
        parquet.write_table(columns, out, row_group_size=7, compression=compression)
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
        method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        with zipfile.ZipFile(out, "w", method) as archive:
            archive.writestr("a.txt", texts[0])
            archive.writestr("in/b.jsonl", lines)
        return out.getvalue()
    if kind == "dat.zst":
        return zstandard.compress(b"".join(b"%016d" % len(t.encode()) + t.encode() for t in texts))
    pack = {"jsonl": bytes, "jsonl.zst": zstandard.compress}
    pack |= {"jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}
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
    texts = []
    for i, line in enumerate(data.split(b"\n")):
        text = line.decode("utf-8-sig" if not i else "utf-8")
        if text.strip():
            value = json.loads(text)
            if isinstance(value, list):
                texts += value
            else:
                texts.append(value if isinstance(value, str) else value["text"])
    return ["\n\n".join(text) if isinstance(text, list) else text for text in texts]


def dat_texts(data):
    texts = []
    while data:
        size = int(data[:16])
        texts.append(data[16 : 16 + size].decode())
        data = data[16 + size :]
    return texts


def of_members(members):
    texts = []
    for name, data in members:
        texts += json_texts(data) if ".json" in name else [data.decode()]
    return texts


def unpack_zstd(data):
    reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
    return reader.read()


def by_others(data):
    # the texts as other code reads them
    if kind == "parquet":
        # no threads at our exit
        table = parquet.read_table(io.BytesIO(data), use_threads=False, pre_buffer=False)
        return table.column("text").to_pylist()
    if kind == "arrow":
        return pyarrow.ipc.open_stream(data).read_all().column("text").to_pylist()
    if kind == "tar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = [member for member in archive if member.isreg()]
            return of_members([(file.name, archive.extractfile(file).read()) for file in files])
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = [member for member in archive.infolist() if not member.is_dir()]
            return of_members([(file.filename, archive.read(file)) for file in files])
    unpack = {".zst": unpack_zstd, ".gz": gzip.decompress, ".xz": lzma.decompress}
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
            read = [document.tobytes() for document in IndexedDataset(name)]
            assert read == index_by_hand(bad, tokens)
            counts["good"] += 1
        except CastaliaError as error:
            assert "fuzz" in str(error), error
            counts["refused"] += 1


def inputs():
    path = folder / f"fuzz.{kind}"
    for turn in range(count):
        data = mutated(original())
        path.write_bytes(data)
        signal.alarm(20)
        try:
            read = list(read_documents([path]))
            assert read == by_others(data)
            counts["good"] += 1
        except CastaliaError as error:
            assert "fuzz" in str(error), error
            counts["refused"] += 1
        if turn % 50 == 0:
            signal.alarm(40)
            try:
                done = prepare([path], folder / "out", "bytes", reject=True, part_bytes=500)
                assert done.documents == len(IndexedDataset(folder / "out"))
            except CastaliaError as error:
                assert "fuzz" in str(error), error


counts = {"good": 0, "refused": 0}
(folder / "plain.jsonl").write_bytes(lines)
whole_index(str(folder / "fuzz")) if kind == "idx" else inputs()
signal.alarm(0)
print(json.dumps(counts))
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
    """Mutations read and refused; fails if the process crashed, hung or raised anything else."""
    command = [sys.executable, "-c", SCRIPT, kind, str(count), "7", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["good"] + counts["refused"] == count
    assert counts["refused"]
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutations(kind, tmp_path):
    mutate(kind, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(kind, tmp_path):
    mutate(kind, 10_000 // len(KINDS), tmp_path)
