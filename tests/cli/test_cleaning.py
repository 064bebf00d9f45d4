"""`castalia data dedup` and `castalia data contamination` as they are typed."""

import functools
import json
from pathlib import Path

import pytest

from castalia.corpus import prepare
from castalia.data import IndexedDataset


@pytest.fixture
def run(monkeypatch, command, tmp_path):
    """run(*words): `castalia data WORDS` in a folder with the token file `c`; (status, out,
    err)."""
    monkeypatch.chdir(tmp_path)
    words = (
        "the quick brown fox jumps over the lazy dog while seven wizards make toxic brew"
        " for the queen"
    )
    texts = [words, "a line of its own", words, words + " again"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "e.txt").write_text("Well: " + words.title())
    prepare(["c.jsonl"], "c", "bytes")

    return functools.partial(command, "data")


def test_dedup(run):
    code, out, err = run("dedup", "c", "--output", "u")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("u: 3 documents, ")
    assert out.splitlines()[1] == "dropped 1 equal and 0 nearly equal documents"
    assert json.loads(run("dedup", "c", "--output", "v", "--near", "0.8", "--json")[1])["dedup"][
        "dropped"
    ] == {
        "equal": 1,
        "near": 1,
    }
    assert len(IndexedDataset("v")) == 2
    code, _, err = run("dedup", "c", "--output", "w", "--near", "2")
    assert code and err.startswith("castalia: error: --near 2.0: ")


def test_contamination(run):
    code, out, err = run(
        "contamination", "c", "--tokenizer", "bytes", "--with", "e.txt", "--report", "r.jsonl"
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "1 of 1 evaluation documents share 13 words in a row with the corpus; 0 are shorter than"
        " that and were not checked",
        "3 of 4 documents of the corpus have such words",
    ]
    last = json.loads(Path("r.jsonl").read_text().splitlines()[-1])
    assert (last["words"], last["ngrams"], last["hits"]) == (19, 7, 3)
    assert last["share"] == pytest.approx(6 / 7)
    code, out, _ = run("contamination", "c.jsonl", "--with", "e.txt", "--json")
    assert (code, json.loads(out)["overlapping"]) == (0, 3)


def test_mask(run):
    code, out, err = run("mask", "c", "--before", "117,105,99,107", "--output", "l")  # "uick"
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "27 tokens are not targets"
    assert IndexedDataset("l")[0].tolist() == [-100] * 9 + IndexedDataset("c")[0].tolist()[9:]
    assert IndexedDataset("l")[1].tolist() == IndexedDataset("c")[1].tolist()
    code, _, err = run("mask", "c", "--before", "x", "--output", "l")
    assert code and "expected token ids such as 37,25" in err
