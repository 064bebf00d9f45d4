"""Text to a token file: the same for any number of processes, whole or not at all."""

import errno
import hashlib
import json
from pathlib import Path

import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.corpus import prepare
from castalia.corpus.part_files import PartWriter
from castalia.data import IndexedDataset, load_tokenizer

TEXTS = ["first", "", "second document", "dritte Straße", "x" * 1000]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "p.train"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir()) if path.exists() else []


def test_tokens_and_manifest(corpus, out):
    done = prepare([corpus], out, "bytes", append_eod=True)
    data = IndexedDataset(out)
    assert [d.tolist() for d in data] == [[*text.encode(), 256] for text in TEXTS if text]
    assert (done.documents, done.empty, done.tokens, done.dtype) == (
        4,
        1,
        int(data.sizes.sum()),
        "uint16",
    )
    assert done.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert names(out.parent) == [
        "p.train.bin",
        "p.train.documents.parquet",
        "p.train.idx",
        "p.train.json",
    ]
    manifest = json.loads((out.parent / "p.train.json").read_text())
    assert manifest["inputs"] == [
        {
            "path": str(corpus),
            "bytes": corpus.stat().st_size,
            "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
        }
    ]
    assert manifest["tokenizer"] == {
        "name": "bytes",
        "sha256": load_tokenizer("bytes").sha256,
        "eod_id": 256,
    }
    assert (manifest["documents"], manifest["append_eod"], manifest["vocab_size"]) == (4, True, 257)


def test_without_end_of_document(corpus, out):
    prepare([corpus], out, load_tokenizer("bytes"))
    assert bytes(IndexedDataset(out)[0].tolist()) == b"first"


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (i % 50)}) + "\n" for i in range(2000)))
    for workers in (1, 3):
        prepare(
            [path, path],
            tmp_path / f"w{workers}",
            "bytes",
            append_eod=True,
            workers=workers,
            part_bytes=5000,
        )
    for suffix in (".bin", ".idx", ".documents.parquet"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()
    assert len(IndexedDataset(tmp_path / "w3")) == 2 * 1960


def test_training_a_tokenizer_first(corpus, out):
    tokenizer = out.parent / "tokenizer.json"
    for _ in range(2):  # the same command again is no error
        done = prepare([corpus], out, tokenizer, train_vocab=270, append_eod=True)
    loaded = load_tokenizer(tokenizer)
    assert done.vocab_size == loaded.vocab_size <= 270
    assert [loaded.decode(d[:-1]) for d in IndexedDataset(out)] == [text for text in TEXTS if text]
    assert {int(d[-1]) for d in IndexedDataset(out)} == {0}
    with pytest.raises(ConfigError, match="exists and differs from the tokenizer trained"):
        prepare([corpus], out, tokenizer, train_vocab=265)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_nothing(corpus, out, workers):
    with corpus.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:6: invalid JSON"):
        prepare([corpus], out, "bytes", workers=workers)
    assert names(out.parent) == []


def test_an_error_after_training_leaves_no_tokenizer(corpus, out, monkeypatch):
    def full(self, suffix, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartWriter, "write", full)
    with pytest.raises(
        CastaliaError, match=r"cannot write .*p\.train\.bin: No space left on device; free space"
    ):
        prepare([corpus], out, out.parent / "t.json", train_vocab=270)
    assert names(out.parent) == []


def test_only_empty_documents_in_a_folder(tmp_path, out):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a.txt").write_text("")
    with pytest.raises(DataError, match="no documents with text"):
        prepare([tmp_path / "e"], out, "bytes")
    assert names(out.parent) == []


def test_outputs_never_replace_inputs(corpus):
    with pytest.raises(ConfigError, match=r"a\.jsonl would be overwritten|would be overwritten"):
        prepare([corpus.rename(corpus.with_suffix(".json"))], corpus.with_suffix(""), "bytes")
    with pytest.raises(ConfigError, match=r"tok\.json would be overwritten"):
        prepare(
            [corpus.with_suffix(".json")],
            corpus.parent / "tok",
            corpus.parent / "tok.json",
            train_vocab=300,
        )


def test_a_tokenizer_without_an_end(corpus, out, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(
        load_tokenizer("bytes").text.replace("<|endoftext|>", "<|stop|>"), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"t\.json has no end-of-document token.*--append-eod"):
        prepare([corpus], out, path, append_eod=True)


def test_bytes_and_tokens_are_reported(corpus, out):
    calls = []
    done = prepare([corpus], out, "bytes", on_progress=lambda *call: calls.append(call))
    assert [sum(call) for call in zip(*calls, strict=True)] == [corpus.stat().st_size, done.tokens]


def test_an_output_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CastaliaError, match=r"cannot write .*file/x\.bin"):
        prepare([corpus], tmp_path / "file" / "x", "bytes")
