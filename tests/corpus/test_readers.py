"""Documents out of text files, and the sentence for each kind of damage."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from castalia.core.errors import DataError
from castalia.corpus import read_documents

PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}
LINES = b'{"text": "one"}\n\n  \n{"text": "", "id": 3}\r\n{"text": "tw\\u00f6\\n"}'


def documents(*paths, key="text"):
    return list(read_documents(paths, key))


@pytest.fixture
def file(tmp_path):
    """file(name, bytes) writes it and returns its path."""

    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines(file, suffix):
    assert documents(file("a.jsonl" + suffix, PACKERS[suffix](LINES))) == ["one", "", "twö\n"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_plain_text_is_one_document(file, suffix):
    assert documents(file("a.txt" + suffix, PACKERS[suffix]("ä\r\n\nb".encode()))) == ["ä\r\n\nb"]


def test_several_frames_and_members(file):
    parts = [b'{"text": "one"}\n', b'{"text": "t', b'wo"}\n']
    assert documents(file("a.jsonl.zst", b"".join(map(zstandard.compress, parts)))) == [
        "one",
        "two",
    ]
    assert documents(file("a.jsonl.gz", b"".join(map(gzip.compress, parts)))) == ["one", "two"]


def test_larger_than_any_buffer(file):
    texts = [str(i) * 4000 for i in range(400)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for suffix, packer in PACKERS.items():
        assert documents(file("big.jsonl" + suffix, packer(data))) == texts


def test_a_mark_at_the_start_is_no_text(file):
    assert documents(
        file("a.txt", b"\xef\xbb\xbfx"), file("a.jsonl", b'\xef\xbb\xbf{"text": "y"}\n')
    ) == ["x", "y"]


def test_another_key(file):
    assert documents(file("a.jsonl", b'{"body": "x"}'), key="body") == ["x"]


def test_a_folder_is_read_sorted_without_hidden_files(file, tmp_path):
    for name in ("d/b.txt", "d/a/z.txt", "d/.hidden.txt", "d/.git/x.txt"):
        file(name, name.encode())
    file("d/c.txt", b"")
    assert documents(tmp_path / "d") == ["d/a/z.txt", "d/b.txt", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl:2: invalid JSON at column 13"),
        (b"[1]", r"a\.jsonl:2: a line must be a JSON object with the key 'text', got list"),
        (
            b'{"txet": "x", "id": 1}',
            r"a\.jsonl:2: .* lacks the key 'text'; keys: id, txet; .*--key; did you mean 'txet'\?",
        ),
        (b'{"text": 5}', r"a\.jsonl:2: 'text' must be a string, got int"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: 'text' contains a lone surrogate"),
        (b'{"text": "a\xffb"}', r"a\.jsonl:2: not UTF-8: byte 0xff at offset 27"),
        (b"[" * 100_000, r"a\.jsonl:2: invalid JSON"),
    ],
)
def test_a_bad_line_is_named(file, line, message):
    path = file("a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(DataError, match=message):
        documents(path)


def test_a_bad_byte_in_plain_text_is_named(file):
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8: byte 0xc3 at offset 4; convert"):
        documents(file("a.txt", b"a\nb\n\xc3\x28"))


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b""), ("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.jsonl", b'{"text": ""}')],
)
def test_an_empty_file_that_was_named(file, name, data):
    with pytest.raises(DataError, match="is empty" if not data else "holds no text"):
        documents(file(name, data))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_off_anywhere(file, suffix):
    whole = PACKERS[suffix](LINES * 50)
    for length in range(1, len(whole)):
        with pytest.raises(DataError, match=r"a\.jsonl\S*: "):
            documents(file("a.jsonl" + suffix, whole[:length]))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_not_compressed_at_all(file, suffix):
    with pytest.raises(DataError, match=r"cannot be read"):
        documents(file("a.jsonl" + suffix, LINES))


def test_missing_inputs(tmp_path):
    with pytest.raises(DataError, match="gone: no such file or folder"):
        documents(tmp_path / "gone")
    with pytest.raises(DataError, match="the folder has no files"):
        documents(tmp_path)
    with pytest.raises(DataError, match="no input files"):
        documents()


def test_what_a_folder_links_to_is_read_and_what_cannot_be_is_told(tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    for name in ("far/deep/x.txt", "corpus/a.txt", "corpus/b/c.txt", "corpus/.hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "corpus" / "a_link").symlink_to("b")  # read under its own name, once
    (tmp_path / "corpus" / "a").mkdir()
    (tmp_path / "corpus" / "a" / "link").symlink_to("../b")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "corpus")
    assert list(read_documents([tmp_path / "corpus"])) == [
        "corpus/a.txt",
        "corpus/b/c.txt",
        "far/deep/x.txt",
    ]
    (tmp_path / "corpus" / "b" / "gone.txt").symlink_to("nowhere.txt")
    for name in (tmp_path / "corpus", tmp_path / "corpus/b/*.txt"):
        with pytest.raises(DataError, match=r"gone\.txt: broken link to nowhere\.txt"):
            list(read_documents([name]))
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        list(read_documents(["x" * 300]))


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    look = Path.iterdir

    def iterdir(self):
        if self.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return look(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # as root may read all
    with pytest.raises(DataError, match="closed: cannot be read: Permission denied"):
        list(read_documents([tmp_path]))
