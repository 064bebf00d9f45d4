"""Archives, .xz and patterns as inputs of `prepare`, and what damage to them says."""

import gzip
import io
import lzma
import random
import tarfile

import pytest
import zstandard

from castalia.core.errors import DataError
from castalia.corpus import prepare, read_documents
from castalia.data import IndexedDataset

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}
MEMBERS = {
    "b.txt": "plain ä".encode(),
    "in/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "in/c.jsonl.zst": zstandard.compress(b'{"text": "three"}\n'),
    "in/d.txt.xz": lzma.compress(b"four"),
    ".hidden/x": b"\xff",
    "./._b.txt": b"\xff",
}
TEXTS = ["plain ä", "one", "two", "three", "four"]


def tar_of(members, **kinds):
    """Bytes of a tar; `kinds` are members of another type by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        folder = tarfile.TarInfo("in")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    return out.getvalue()


def texts_of(*paths, key="text"):
    return list(read_documents(paths, key))


@pytest.mark.parametrize("suffix", PACKERS)
def test_tar(tmp_path, suffix):
    path = tmp_path / f"a.tar{suffix}"
    path.write_bytes(PACKERS[suffix](tar_of(MEMBERS)))
    assert texts_of(path) == TEXTS


def test_short_suffixes_and_prepare(tmp_path):
    (tmp_path / "A.TGZ").write_bytes(gzip.compress(tar_of(MEMBERS)))
    assert prepare([tmp_path / "A.TGZ"], tmp_path / "out", "bytes").documents == 5
    assert bytes(IndexedDataset(tmp_path / "out")[4].tolist()) == b"four"


@pytest.mark.parametrize("name", ["../../up.txt", "/abs.txt", "in/../../up.txt"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_of({name: b"up"}))
    with pytest.raises(DataError, match="the name leads out of the archive"):
        texts_of(tmp_path / "in" / "a.tar")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_of({"x.txt": b"ok\n\xff"}), r"a\.tar\(x\.txt\):2: not UTF-8: byte 0xff at offset 3"),
        (
            tar_of({"x.jsonl": b'{"body": ""}'}),
            r"a\.tar\(x\.jsonl\):1: the document lacks the key 'text'; keys: body",
        ),
        (tar_of({}, link=tarfile.SYMTYPE), r"a\.tar\(link\): an archive may hold plain files only"),
        (tar_of({}, hard=tarfile.LNKTYPE), r"a\.tar\(hard\): an archive may hold plain files only"),
        (
            tar_of({}, pipe=tarfile.FIFOTYPE),
            r"a\.tar\(pipe\): an archive may hold plain files only",
        ),
        (tar_of({"x.tar.gz": b""}), r"a\.tar\(x\.tar\.gz\): an archive may hold plain files only"),
        (tar_of({"x.txt": b"y" * 600})[:1600], r"a\.tar: cannot be read: "),
        (tar_of({"x.txt": b"y"})[:1536], r"a\.tar: cannot be read: the archive is truncated"),
        (b"no archive" * 100, r"a\.tar: cannot be read: "),
        (b"", r"a\.tar: cannot be read: "),
        (tar_of({}), r"a\.tar: holds no text"),
    ],
)
def test_damage_to_a_tar(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "a.tar")


def test_xz(tmp_path):
    parts = [lzma.compress(b'{"text": "one"}\n{"te'), lzma.compress(b'xt": "two"}\n')]
    (tmp_path / "a.jsonl.xz").write_bytes(b"".join(parts))
    assert texts_of(tmp_path / "a.jsonl.xz") == ["one", "two"]
    for damage in (
        lambda data: data[:-3],
        lambda data: data[:30] + b"\xff\xff" + data[32:],
        lambda data: b"none",
    ):
        (tmp_path / "a.jsonl.xz").write_bytes(damage(parts[0] + parts[1]))
        with pytest.raises(DataError, match=r"a\.jsonl\.xz: cannot be read: "):
            texts_of(tmp_path / "a.jsonl.xz")


def test_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "in/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "in/d.txt"]
    assert texts_of(tmp_path / "[bc].*", tmp_path / "a.txt") == ["b.txt", "c.md", "a.txt"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert texts_of(tmp_path / "odd[1].txt") == ["odd"]
    with pytest.raises(DataError, match=r"\*\.json: no file matches this pattern"):
        texts_of(tmp_path / "*.json")


@pytest.mark.parametrize("suffix", PACKERS)
def test_mutated_archives_never_crash(tmp_path, suffix):
    rng = random.Random(5)
    plain = bytes(tar_of(MEMBERS))
    path = tmp_path / f"a.tar{suffix}"
    outcomes = set()
    for _ in range(150):
        data = bytearray(PACKERS[suffix](plain)) if rng.random() < 0.5 else bytearray(plain)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            outcomes.add(len(texts_of(path)) > 0)
        except DataError as error:
            assert str(path) in str(error)
            outcomes.add(False)
    assert False in outcomes
