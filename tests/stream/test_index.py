"""The index of a token file against brute force: counts, places, continuations, refusals."""

import itertools
from collections import Counter

import numpy as np
import pytest

from castalia.core.errors import CastaliaError, DataError
from castalia.data import IndexedDataset, IndexedDatasetWriter
from castalia.stream.index import FileScan, Index, build_index, building, search
from castalia.stream.index.parts import Layout, Part

PART = 300
"""Tokens of a part: small, so that many texts lie across a border."""


def write(prefix, documents, dtype):
    """A token file of lists of ids."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return IndexedDataset(prefix)


def documents_of(dtype, end):
    """120 documents of few different ids, so that texts repeat; some are empty."""
    random = np.random.default_rng(5)
    scale = 1 if np.dtype(dtype).itemsize < 4 else 70_000
    documents = [scale * random.integers(1, 5, size) for size in random.integers(0, 60, 120)]
    return [np.append(ids, end) if end is not None else ids for ids in documents]


def brute(documents, ids):
    """Every document and offset at which ids begin."""
    length = len(ids)
    return [
        (number, offset)
        for number, document in enumerate(documents)
        for offset in range(len(document) - length + 1)
        if document[offset : offset + length].tolist() == list(ids)
    ]


@pytest.mark.parametrize(("dtype", "end"), [("uint16", 0), ("int32", 0), ("uint8", None)])
def test_index_and_scan_equal_brute_force(tmp_path, dtype, end, monkeypatch):
    monkeypatch.setattr(search, "READ_TOKENS", 100)
    documents = documents_of(dtype, end)
    dataset = write(tmp_path / "a", documents, dtype)
    record = build_index(dataset, part_tokens=PART, workers=1)
    tokens = sum(map(len, documents))
    assert record["tokens"] == tokens
    assert record["parts"] == -(-tokens // PART) > 5
    assert record["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "a.index").glob("part-*")
    )
    index = Index(dataset)
    longest = max(documents, key=len)
    scale = int(documents[3].max()) // int(documents[3].max() % 7 or 1)
    queries = [[int(i)] for i in np.unique(longest)]
    queries += [longest[i : i + n].tolist() for n in (2, 3, 5, 40, len(longest)) for i in (0, 7)]
    queries += [[0, scale], [9], [1 << 20], [1 << 40]]
    for ids in queries:
        expected = brute(documents, ids)
        for how in (index, FileScan(dataset, threads=2)):
            found = zip(*(a.tolist() for a in how.flat.documents_of(how.find(ids))), strict=True)
            assert list(found) == expected, (ids, how)
            assert how.count(ids) == len(expected)
            following = Counter(
                int(documents[number][offset + len(ids)])
                for number, offset in expected
                if offset + len(ids) < len(documents[number])
            )
            assert how.following(ids) == following
    assert index.following([]) == Counter(itertools.chain(*(d.tolist() for d in documents)))
    tail = documents[3][-6:].tolist()
    assert index.longest_suffix([9, *tail]) == tail
    assert index.longest_suffix([9]) == []


def test_longer_text_than_the_overlap_of_parts(tmp_path):
    text = [1, 2, 3] * 40
    dataset = write(tmp_path / "a", [text, [1, 2, 3] * 10], "uint16")
    build_index(dataset, part_tokens=50, workers=1)
    index = Index(dataset)
    index.layout = Layout(len(index), index.layout.width, 50, overlap=4)
    for number in range(index.layout.parts):
        building.build_part(dataset, index.folder, index.layout, number)
    index.parts = [
        Part(index.flat, index.folder, index.layout, number) for number in range(index.layout.parts)
    ]
    for length in (3, 4, 5, 30, 60, 120):
        assert index.count(text[:length]) == len(
            brute([np.array(text), np.array(text[:30])], text[:length])
        )


def test_a_stopped_build_goes_on_and_parts_in_processes_are_the_same(tmp_path, monkeypatch):
    documents = documents_of("uint16", 0)
    dataset = write(tmp_path / "a", documents, "uint16")
    build_index(dataset, tmp_path / "whole", part_tokens=PART, workers=1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole/a.index").glob("part-*")}

    def stop_after_two(tokens, told=[]):  # noqa: B006
        told.append(tokens)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(dataset, part_tokens=PART, workers=1, on_tokens=stop_after_two)
    with pytest.raises(DataError, match=r"\d+ of \d+ parts are missing; build it with"):
        Index(dataset)
    # A part of a killed process has a temporary name, and a short one is no part.
    (tmp_path / "a.index/.part-00004.places.1234.tmp").write_bytes(b"half")
    (tmp_path / "a.index/part-00005.places").write_bytes(b"half")
    record = build_index(dataset, part_tokens=PART, workers=2)
    assert record["built"] == record["parts"] - 2
    files = {path.name: path.read_bytes() for path in (tmp_path / "a.index").glob(".part*")}
    assert files == {}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "a.index").glob("part-*")}
    assert build_index(dataset, part_tokens=PART)["built"] == 0


def test_refusals(tmp_path):
    documents = documents_of("uint16", 0)
    dataset = write(tmp_path / "a", documents, "uint16")
    with pytest.raises(DataError, match=r"a.index: no index of .*castalia index"):
        Index(dataset)
    build_index(dataset)
    documents[2] = documents[2] + 1
    changed = write(tmp_path / "a", documents, "uint16")
    for refused in (lambda: Index(changed), lambda: build_index(changed)):
        with pytest.raises(DataError, match=r"contents differ.*of other data.*--overwrite"):
            refused()
    build_index(changed, overwrite=True)
    assert Index(changed).count(documents[2][:3].tolist()) == len(
        brute(documents, documents[2][:3].tolist())
    )
    part = tmp_path / "a.index/part-00000.places"
    Index(changed).verify()
    content = bytearray(part.read_bytes())
    content[40] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000.places: other bytes than were written"):
        Index(changed).verify()
    part.unlink()
    assert build_index(changed)["built"] == 1
    Index(changed).verify()
    (tmp_path / "a.index/index.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match=r"format 1, expected 2; remove .* and build"):
        Index(changed)
    (tmp_path / "a.index/index.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match=r"not the manifest of an index.*remove"):
        Index(changed)
    negative = write(tmp_path / "n", [[1, -100]], "int32")
    with pytest.raises(CastaliaError, match="holds token -100"):
        build_index(negative)
