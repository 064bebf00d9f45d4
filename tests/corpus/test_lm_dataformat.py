"""Files of lm_dataformat, GPT-NeoX's reader: each format gives the documents that it gives."""

import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
import zstandard

from castalia.core.errors import CastaliaError, DataError
from castalia.corpus import prepare, read_documents, streams
from castalia.corpus.provenance import read_provenance
from castalia.data import IndexedDataset

TEXTS = ["one", "zwei ä 中 🙂", "", "line\none\r\n", "0000000000000005", "x" * 70_000, "last"]


def dat(*texts):
    """The bytes of DatArchive before compression."""
    return b"".join(
        b"%016d" % len(text) + text
        for text in (t if isinstance(t, bytes) else t.encode() for t in texts)
    )


def tar(**members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def far_reaching(data, window_log=31):
    """A .zst of which a match may reach back 2^window_log bytes, as of `zstd --ultra --long=31`."""
    settings = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=window_log, enable_ldm=True
    )
    # Without the size of the content, which would make the window small.
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(data) + stream.flush()


FORMS = {
    "a.dat.zst": zstandard.compress(dat(*TEXTS)),
    "a.json.zst": zstandard.compress(json.dumps(TEXTS).encode()),
    "a.jsonl.zst": zstandard.compress(
        "".join(json.dumps({"text": t, "meta": {}}) + "\n" for t in TEXTS).encode()
    ),
    "a.jsonl": "".join(json.dumps(t) + "\n" for t in TEXTS).encode(),
    "a.json.gz": gzip.compress(
        "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in TEXTS).encode()
    ),
    "urlsf_subset00-1_data.xz": lzma.compress(
        tar(**{f"{i}.txt": t.encode() for i, t in enumerate(TEXTS)})
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form(name, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name])
    assert list(read_documents([tmp_path / name])) == TEXTS
    for size in (700, 1 << 20):
        done = prepare(
            [tmp_path / name],
            tmp_path / "out",
            "bytes",
            part_bytes=size,
            workers=1 + (size == 700),
            overwrite=True,
        )
        written = [
            bytes(document.tolist()).decode() for document in IndexedDataset(tmp_path / "out")
        ]
        assert (written, done.empty) == ([text for text in TEXTS if text], 1)


def test_parts_that_are_shorter_than_a_line(tmp_path):
    short = [text[:40] for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(FORMS["a.jsonl"].replace(b"x" * 70_000, b"x" * 40))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", "bytes", part_bytes=20)
    dataset = IndexedDataset(tmp_path / "out")
    assert [bytes(document.tolist()).decode() for document in dataset] == list(filter(None, short))


def test_long_windows(tmp_path):
    """In every form, and in an archive; none is a reason to reject a good file."""
    for name in ("a.dat.zst", "a.json.zst", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(far_reaching(zstandard.decompress(FORMS[name])))
        assert list(read_documents([tmp_path / name])) == TEXTS
    members = {"a.jsonl.zst": far_reaching(b'{"text": "one"}\n', 30), "b.txt": b"two"}
    (tmp_path / "in.tar.zst").write_bytes(far_reaching(tar(**members), 28))
    done = prepare([tmp_path / "in.tar.zst"], tmp_path / "out", "bytes", reject=True)
    assert (done.documents, done.rejected) == (2, 0)


def test_a_hostile_window_takes_little_memory(tmp_path, monkeypatch):
    """Runs of one byte, 128 KiB each in four bytes; and a window that there is no memory for."""
    run = ((1 << 17) << 3 | 2).to_bytes(3, "little") + b"a"
    hostile = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + 3000 * run  # the window: 2^31 bytes
    (tmp_path / "a.jsonl.zst").write_bytes(hostile)
    with open(tmp_path / "a.jsonl.zst", "rb") as file:
        stream = streams.ZstdFile(file)
        stream.read(1)
        assert len(stream.ready) < 1 << 28

    class NoMemory:
        def decompress(self, data):
            raise zstandard.ZstdError(
                "zstd decompressor error: Allocation error : not enough memory"
            )

    monkeypatch.setattr(streams, "zstd_frame", NoMemory)
    with pytest.raises(CastaliaError, match="no memory for the window") as caught:
        prepare([tmp_path / "a.jsonl.zst"], tmp_path / "out", "bytes", reject=True)
    assert not isinstance(caught.value, DataError) and not (tmp_path / "out.bin").exists()


def test_a_text_in_paragraphs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ["one", "two"]}\n{"text": []}\n{"text": ["x"]}\n')
    assert list(read_documents([tmp_path / "a.jsonl"])) == ["one\n\ntwo", "", "x"]
    (tmp_path / "a.jsonl").write_text('{"text": ["one", 2]}\n')
    with pytest.raises(DataError, match="'text' must be a string, got list"):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_openwebtext_is_a_tar_of_tars(tmp_path):
    inner = {
        f"openwebtext/urlsf_subset0{i}-1_data.xz": lzma.compress(tar(**{"a.txt": b"%d" % i}))
        for i in range(3)
    }
    (tmp_path / "openwebtext.tar.xz").write_bytes(lzma.compress(tar(**inner)))
    assert list(read_documents([tmp_path / "openwebtext.tar.xz"])) == ["0", "1", "2"]
    prepare([tmp_path / "openwebtext.tar.xz"], tmp_path / "out", "bytes")
    assert (
        read_provenance(str(tmp_path / "out"), 1)["member"]
        == "openwebtext/urlsf_subset01-1_data.xz/a.txt"
    )
    hostile = {"urlsf_subset00_data.xz": lzma.compress(tar(**{"../../up.txt": b"x"}))}
    (tmp_path / "openwebtext.tar.xz").write_bytes(lzma.compress(tar(**hostile)))
    with pytest.raises(DataError, match=r"up\.txt\): the name leads out of the archive"):
        list(read_documents([tmp_path / "openwebtext.tar.xz"]))


def test_where_a_document_of_a_dat_came_from(tmp_path):
    (tmp_path / "a.dat.zst").write_bytes(FORMS["a.dat.zst"])
    prepare([tmp_path / "a.dat.zst"], tmp_path / "out", "bytes", part_bytes=40)
    entry, raw = read_provenance(str(tmp_path / "out"), 5), dat(*TEXTS)
    assert (entry["line"], raw[entry["start"] : entry["stop"]]) == (7, b"last")


def test_a_dat_with_a_bad_document(tmp_path):
    path = tmp_path / "a.dat.zst"
    path.write_bytes(zstandard.compress(dat("one", b"caf\xe9", "three")))
    with pytest.raises(DataError, match=r"a\.dat\.zst:2: not UTF-8: byte 0xe9 at offset 3"):
        list(read_documents([path]))
    assert prepare([path], tmp_path / "out", "bytes", reject=True).rejected == 1
    with pytest.raises(DataError, match="its texts have no keys"):
        prepare([path], tmp_path / "out", "bytes", keys=("a", "b"))


def test_a_dat_cut_off_anywhere(tmp_path):
    whole, path = dat("one", "two", "three"), tmp_path / "a.dat.zst"
    ends = {len(dat(*("one", "two", "three")[:count])) for count in range(4)}
    for length in range(1, len(whole)):
        path.write_bytes(zstandard.compress(whole[:length]))
        if length in ends:
            assert len(list(read_documents([path]))) == sorted(ends).index(length)
        else:
            with pytest.raises(DataError, match=r"a\.dat\.zst: cannot be read: "):
                list(read_documents([path]))
    for head in (b"9" * 16, b"-000000000000001", b"text of other kind", b"\xd9\xa0" * 8):
        path.write_bytes(zstandard.compress(dat("one") + head + b"two"))
        with pytest.raises(DataError, match="expected the length of a document"):
            list(read_documents([path]))


def test_beside_lm_dataformat_itself(tmp_path):
    peer = pytest.importorskip("lm_dataformat", reason="needs pip install lm_dataformat")
    for kind, words in (
        (peer.Archive, {"meta": {"n": 1}}),
        (peer.DatArchive, {}),
        (peer.JSONArchive, {}),
    ):
        folder = tmp_path / kind.__name__
        archive = kind(str(folder))
        for text in TEXTS:
            archive.add_data(text, **words)
        archive.commit()
        expected = list(peer.Reader(str(folder)).stream_data())
        assert list(read_documents([folder])) == expected == TEXTS
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for i, text in enumerate(TEXTS):
            file.writestr(f"{i}.txt", text)
    assert list(read_documents([tmp_path / "a.zip"])) == list(
        peer.Reader(str(tmp_path / "a.zip")).stream_data()
    )
