"""Overlaps of evaluation documents with a corpus, against a plain search of word tuples."""

import json
import random
import re

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.curate.contamination import contamination
from castalia.data import load_tokenizer


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def report(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "corpus" in line], [
        line for line in lines if "evaluation" in line
    ]


def grams(text, n):
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.mark.parametrize("n", [1, 3, 13])
def test_against_a_plain_search(tmp_path, n):
    rng = random.Random(n)
    texts = [" ".join(rng.choice("abcd") for _ in range(rng.randrange(40))) for _ in range(60)]
    corpus = texts[:40]
    wanted = [*texts[40:], texts[3].upper().replace(" ", ", "), texts[5][:30]]
    findings = contamination(
        [jsonl(tmp_path / "c.jsonl", corpus)],
        [jsonl(tmp_path / "e.jsonl", wanted)],
        ngram=n,
        report=tmp_path / "report.jsonl",
    )
    sets = [set(grams(text, n)) for text in corpus]
    there = set().union(*sets)
    in_corpus, evaluated = report(tmp_path / "report.jsonl")
    for text, line in zip(wanted, evaluated, strict=True):
        mine = grams(text, n)
        assert line["share"] == (sum(g in there for g in mine) / len(mine) if mine else None)
        assert line["hits"] == sum(bool(ngrams & set(mine)) for ngrams in sets)
    sought = set().union(*(grams(text, n) for text in wanted))
    assert [(line["corpus"]["document"], line["ngrams"]) for line in in_corpus] == [
        (i, len(ngrams & sought)) for i, ngrams in enumerate(sets) if ngrams & sought
    ]
    assert findings.contaminated == sum(line["hits"] > 0 for line in evaluated)
    assert findings.too_short == sum(line["share"] is None for line in evaluated)
    assert (findings.documents, findings.overlapping) == (40, len(in_corpus))


def test_a_token_file_and_a_question_with_its_answer(tmp_path):
    jsonl(
        tmp_path / "c.jsonl", ["nothing here", "Who wrote it?\nThe poet Sappho wrote it, they say."]
    )
    prepare([tmp_path / "c.jsonl"], tmp_path / "c", "bytes", append_eod=True)
    line = {"q": "who wrote it", "a": "the poet sappho"}
    (tmp_path / "e.jsonl").write_text(json.dumps(line) + "\n")
    paths = [str(tmp_path / "c")], [str(tmp_path / "e.jsonl")]
    options = {"keys": ["q", "a"], "ngram": 6, "report": tmp_path / "r.jsonl"}
    findings = contamination(*paths, tokenizer=load_tokenizer("bytes"), **options)
    assert (findings.contaminated, findings.overlapping) == (1, 1)
    in_corpus, evaluated = report(tmp_path / "r.jsonl")
    assert in_corpus[0]["corpus"] == {"file": str(tmp_path / "c"), "document": 1}
    assert evaluated[0]["documents"] == [{"file": str(tmp_path / "c"), "document": 1}]
    with pytest.raises(ConfigError, match="give its --tokenizer"):
        contamination(*paths, **options)


def test_another_tokenizer_than_the_corpus_has_finds_nothing_and_is_refused(tmp_path):
    corpus = jsonl(tmp_path / "c.jsonl", ["the quick brown fox"])
    prepare([corpus], tmp_path / "c", "bytes")
    with pytest.raises(
        ConfigError, match="c was made with tokenizer bytes, but char is a different one"
    ):
        contamination([str(tmp_path / "c")], [corpus], tokenizer=load_tokenizer("char"), ngram=2)


def test_no_evaluation_documents_are_no_clean_corpus(tmp_path):
    corpus = jsonl(tmp_path / "c.jsonl", ["the quick brown fox"])
    empty = jsonl(tmp_path / "e.jsonl", [])
    assert contamination(tmp_path / "c.jsonl", corpus, ngram=2).contaminated == 1
    with pytest.raises(DataError, match=r"e\.jsonl: is empty"):
        contamination([corpus], [corpus, empty], ngram=2)
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "e.jsonl", [])
    with pytest.raises(DataError, match="folder: no evaluation documents"):
        contamination([corpus], [str(tmp_path / "folder")], ngram=2)


def test_the_report_is_not_written_over_an_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two three"}\n')
    with pytest.raises(ConfigError, match=r"--report .*a\.jsonl is an input of the comparison"):
        contamination([path], [path], report=path)
    assert path.read_text() == '{"text": "one two three"}\n'
