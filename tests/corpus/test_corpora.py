"""Named corpora from a local server that drops connections, restarts, lies, or is missing."""

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.corpus import downloads, prepare, read_documents
from castalia.corpus.downloads import RemoteFile
from castalia.corpus.named_corpora import CORPORA, Corpus, download, resolve_inputs, table
from castalia.data import IndexedDataset

BODY = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5000)).encode()


class Server(ThreadingHTTPServer):
    """Serves BODY.

    It drops the next connections after `breaks` bytes; `ranges` says whether it can resume.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks, self.ranges, self.asked, self.body, self.mark, self.shift = (
            [],
            True,
            [],
            BODY,
            '"one"',
            0,
        )
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if self.headers.get("If-Range", server.mark) != server.mark:
            wanted = None
        start = int(wanted.split("=")[1].split("-")[0]) if wanted and server.ranges else 0
        if "moved" in self.path:
            self.send_response(302)
            self.send_header("Location", "/a.jsonl")
            self.end_headers()
            return
        if "gone" in self.path:
            self.send_error(404)
            return
        if start >= len(server.body):
            self.send_error(416)
            return
        start = max(start - server.shift, 0)
        data = server.body[start:]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"
            )
        self.send_header("ETag", server.mark)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: server.breaks.pop(0)] if server.breaks else data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def corpus(server, **facts):
    known = {"sha256": hashlib.sha256(BODY).hexdigest(), "size": len(BODY), **facts}
    return Corpus((RemoteFile(f"{server.url}/a.jsonl", **known),), "a test")


def test_a_download_that_breaks_off_goes_on(server, tmp_path):
    server.breaks = [1000, 2000]
    heard = []
    (path,) = download(corpus(server), tmp_path, heard.append)
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]
    assert sum(heard) == len(BODY)
    assert download(corpus(server), tmp_path) == [path] and len(server.asked) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".claim", "a.jsonl"]


def test_a_process_that_was_killed_goes_on(server, tmp_path):
    (tmp_path / "a.jsonl.partial").write_bytes(BODY[:7777])
    (path,) = download(corpus(server), tmp_path)
    assert (path.read_bytes(), server.asked) == (BODY, ["bytes=7777-"])


def test_a_server_that_cannot_go_on_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.jsonl.partial").write_bytes(b"x" * 500)
    assert download(corpus(server), tmp_path)[0].read_bytes() == BODY


def test_a_file_that_is_another_one_now_is_begun_anew(server, tmp_path):
    unknown = Corpus((RemoteFile(f"{server.url}/a.jsonl"),), "no hash is known")
    server.breaks = [1000, 0, 0, 0, 0]
    with pytest.raises(DataError):
        download(unknown, tmp_path)
    assert (tmp_path / "a.jsonl.partial").read_bytes() == BODY[:1000]
    server.body, server.mark = BODY.upper(), '"two"'
    (path,) = download(unknown, tmp_path)
    assert path.read_bytes() == BODY.upper()
    assert not [p.name for p in tmp_path.iterdir() if "partial" in p.name]


def test_bytes_from_another_place_are_not_put_behind(server, tmp_path):
    unknown = Corpus((RemoteFile(f"{server.url}/a.jsonl"),), "no hash is known")
    (tmp_path / "a.jsonl.partial").write_bytes(BODY[:5000])
    server.shift = 100
    assert download(unknown, tmp_path)[0].read_bytes() == BODY


def test_a_moved_file_and_one_server_at_a_time(server, tmp_path, monkeypatch):
    paths = []
    known = {"sha256": hashlib.sha256(BODY).hexdigest(), "size": len(BODY)}
    moved = Corpus((RemoteFile(f"{server.url}/moved/a.jsonl", **known),), "another address answers")
    both = [
        threading.Thread(target=lambda: paths.extend(download(moved, tmp_path))) for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [path.read_bytes() for path in paths] == [BODY, BODY]
    assert len(server.asked) == 2  # the address that sends on, and the one that answers, each once


def test_other_bytes_are_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl.*SHA-256 .*, but http.* has 00000"):
        download(corpus(server, sha256="0" * 64), tmp_path)
    with pytest.raises(DataError, match=rf"{len(BODY)} bytes, but http.* has 12;"):
        download(corpus(server, size=12, sha256=None), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".jsonl", ".partial")] == []
    (tmp_path / "a.jsonl").write_bytes(BODY[:-1])
    with pytest.raises(DataError, match=r"a\.jsonl has \d+ bytes, but .*; remove it"):
        download(corpus(server), tmp_path)


def test_what_does_not_answer(server, tmp_path):
    gone = Corpus((RemoteFile(f"{server.url}/gone.jsonl"),), "a test")
    with pytest.raises(
        DataError, match=r"gone\.jsonl: cannot be downloaded \(HTTP 404\); name your own copy"
    ):
        download(gone, tmp_path)
    server.breaks = [0] * 9
    with pytest.raises(DataError, match=r"run the same command to continue|cannot be downloaded"):
        download(corpus(server), tmp_path)


def test_dead_addresses_are_said_to_be_dead(tmp_path):
    with pytest.raises(
        ConfigError, match=r"the-eye\.eu removed its copy of the Pile.*pile_uncopyrighted"
    ):
        resolve_inputs(["pile"], tmp_path)
    neox = """enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3
        hackernews openwebtext2 stackexchange ubuntu_irc youtube_subtitles c4 c4_openwebtext
        enwik8"""
    assert set(neox.split()) <= set(CORPORA)
    assert "dead" in table() and "enwik8" in table()


def test_a_corpus_by_name(server, tmp_path, monkeypatch):
    monkeypatch.setitem(CORPORA.items, "tiny", corpus(server))
    monkeypatch.chdir(tmp_path)
    files = resolve_inputs(["tiny"], "corpora")
    assert files == ["corpora/tiny/a.jsonl"]
    assert prepare(files, "out", "bytes").documents == 5000
    (tmp_path / "tiny").write_text("a file goes first")
    assert resolve_inputs(["tiny"], "corpora") == ["tiny"]


def test_a_zip_as_enwik8_is_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("enwik8", "all of it")
        archive.writestr("in/b.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert list(read_documents([tmp_path / "a.zip"])) == ["all of it", "one", "two"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../up.txt", "x")
    with pytest.raises(DataError, match="the name leads out of the archive"):
        list(read_documents([tmp_path / "a.zip"]))


def test_a_url_as_an_input(server, tmp_path):
    pytest.importorskip("aiohttp", reason="needs pip install 'castalia[http]'")
    prepare([f"{server.url}/a.jsonl"], tmp_path / "out", "bytes")
    (tmp_path / "a.jsonl").write_bytes(BODY)
    prepare([tmp_path / "a.jsonl"], tmp_path / "local", "bytes")
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "local.bin").read_bytes()
    assert len(IndexedDataset(tmp_path / "out")) == 5000
    with pytest.raises(DataError, match=r"gone\.jsonl: (no such file|cannot be read)"):
        prepare([f"{server.url}/gone.jsonl"], tmp_path / "out", "bytes")
    with pytest.raises(
        DataError, match=r"http://127\.0\.0\.1:1/a\.jsonl: cannot be read: Cannot connect"
    ):
        prepare(["http://127.0.0.1:1/a.jsonl"], tmp_path / "out", "bytes")


def test_a_url_that_breaks_off_is_never_taken_for_bad_documents(server, tmp_path):
    pytest.importorskip("aiohttp", reason="needs pip install 'castalia[http]'")
    for reject in (False, True):
        server.breaks = [100_000] * 20
        with pytest.raises(
            CastaliaError,
            match=r"a\.jsonl: the connection broke \(.*\); run the same command to continue",
        ):
            prepare([f"{server.url}/a.jsonl"], tmp_path / "out", "bytes", reject=reject)
    server.breaks = []
    assert prepare([f"{server.url}/a.jsonl"], tmp_path / "out", "bytes").documents == 5000


def test_records_have_no_credentials_of_an_address(server, tmp_path):
    pytest.importorskip("aiohttp")
    address = f"{server.url}/a.jsonl?token=k9&part=1"
    server.body = b'{"text": "one"}\n{"other": 1}\n'
    out = tmp_path / "out"
    prepare([address], out, "bytes", reject=True)
    for path in tmp_path.iterdir():
        assert b"k9" not in path.read_bytes(), path
    assert json.loads((tmp_path / "out.json").read_text())["inputs"][0]["path"].endswith(
        "/a.jsonl?token=***&part=1"
    )
    # The same job, although its record does not have the address.
    assert prepare([address], out, "bytes", reject=True).done_before
