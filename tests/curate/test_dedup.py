"""Duplicates: what goes, what stays, in which order, and what the report says."""

import itertools
import json
import random

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import prepare
from castalia.corpus.provenance import read_provenance
from castalia.curate.dedup import Near, dedup, jaccard, read_report, shingles
from castalia.curate.verify import verify
from castalia.data import IndexedDataset, IndexedDatasetWriter


@pytest.fixture
def written(tmp_path):
    """written(name, documents): a token file of these, and its prefix."""

    def write(name, documents, dtype=np.uint16):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            for document in documents:
                writer.add(np.asarray(document, dtype))
        return str(tmp_path / name)

    return write


def contents(prefix):
    return [document.tolist() for document in IndexedDataset(prefix)[:]]


def test_the_first_of_equal_documents_stays(written, tmp_path):
    a = written("a", [[1, 2], [3], [1, 2], [], [2, 1]])
    b = written("b", [[3], [1, 2, 0], [], [9]])
    record = dedup([a, b], tmp_path / "u")
    assert contents(tmp_path / "u") == [[1, 2], [3], [], [2, 1], [1, 2, 0], [9]]
    assert record["dedup"]["dropped"] == {"equal": 3, "near": 0}
    assert [
        (line["prefix"], line["document"], line["repeats"]) for line in read_report(tmp_path / "u")
    ] == [
        (a, 2, {"prefix": a, "document": 0}),
        (b, 0, {"prefix": a, "document": 1}),
        (b, 2, {"prefix": a, "document": 3}),
    ]
    assert all(check.ok for check in verify([str(tmp_path / "u")]))


def test_shingles_are_those_of_sets_of_tuples():
    random.seed(3)
    for _ in range(50):
        a, b = ([random.randrange(3) for _ in range(random.randrange(1, 30))] for _ in range(2))
        sets = [{tuple(x[i : i + 4]) for i in range(max(1, len(x) - 3))} for x in (a, b)]
        expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert jaccard(*(np.unique(shingles(np.array(x), 4)) for x in (a, b))) == expected


def test_near_duplicates_against_all_pairs(written, tmp_path):
    """Dropped documents equal a comparison of all pairs, except close to the threshold."""
    rng = random.Random(1)
    bases = [[rng.randrange(60000) for _ in range(rng.randrange(100, 300))] for _ in range(25)]
    documents = []
    for base, changes in itertools.product(bases, (0, 1, 4, 40)):
        document = list(base)
        for _ in range(changes):
            document[rng.randrange(len(document))] = rng.randrange(60000)
        documents.append(document)
    rng.shuffle(documents)
    record = dedup([written("d", documents)], tmp_path / "u", near=Near(0.7))
    sets = [np.unique(shingles(np.array(document), 5)) for document in documents]
    kept = []
    gone = {}
    for i, mine in enumerate(sets):
        best = max(((jaccard(mine, sets[k]), -k) for k in kept), default=(0.0, 0))
        if best[0] >= 0.7:
            gone[i] = (best[0], -best[1])
        else:
            kept.append(i)
    assert contents(tmp_path / "u") == [documents[i] for i in kept]
    dropped = {
        line["document"]: (line["jaccard"], line["repeats"]["document"])
        for line in read_report(tmp_path / "u")
    }
    assert dropped.keys() == gone.keys() and len(gone) > 20
    assert all(dropped[i][0] == pytest.approx(gone[i][0]) for i in gone)
    assert sum(record["dedup"]["dropped"].values()) == len(gone)


def test_other_documents_of_the_same_n_grams_are_near(written, tmp_path):
    record = dedup(
        [written("d", [[1, 1, 1], [1, 1, 1, 1]])], tmp_path / "u", near=Near(0.9, ngram=2)
    )
    assert record["dedup"]["dropped"] == {"equal": 0, "near": 1}
    assert [(line["jaccard"], line["equal"]) for line in read_report(tmp_path / "u")] == [
        (1.0, False)
    ]


def test_what_equals_a_document_that_went_repeats_the_kept_one(written, tmp_path):
    kept = list(range(100))
    near = [*range(99), 7]
    dedup([written("a", [kept, near, near, kept])], tmp_path / "u", near=Near(0.8))
    lines = [json.loads(line) for line in (tmp_path / "u.dropped.jsonl").read_text().splitlines()]
    assert [(line["document"], line["repeats"]["document"], line["equal"]) for line in lines] == [
        (1, 0, False),
        (2, 0, False),
        (3, 0, True),
    ]
    assert lines[0]["jaccard"] == lines[1]["jaccard"] < 1


def test_the_index_of_documents_goes_along(tmp_path):
    texts = ["one", "two", "one", "three"]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": t, "id": str(i)}) + "\n" for i, t in enumerate(texts))
    )
    prepare([tmp_path / "c.jsonl"], tmp_path / "c", "bytes")
    dedup(tmp_path / "c", tmp_path / "u")  # one needs no list
    assert [read_provenance(str(tmp_path / "u"), i)["line"] for i in range(3)] == [1, 2, 4]


def test_errors(written, tmp_path):
    a = written("a", [[1]])
    with pytest.raises(ConfigError, match="Jaccard index between 0 and 1"):
        Near(1.5)
    with pytest.raises(DataError, match=r"holds int32, but .* holds uint16"):
        dedup([a, written("b", [[1]], np.int32)], tmp_path / "u")
    with pytest.raises(ConfigError, match="would be overwritten"):
        dedup([a], a)
    with pytest.raises(DataError, match="no such file"):
        dedup([tmp_path / "none"], tmp_path / "u")
    assert not (tmp_path / "u.bin").exists() and not (tmp_path / "u.dropped.jsonl").exists()
