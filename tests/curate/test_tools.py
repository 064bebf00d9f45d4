"""Merging, splitting, describing and verifying token files."""

import hashlib
import json
import os
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.core.sealed import OWN_HASH
from castalia.corpus import prepare
from castalia.curate import joining as joining_module
from castalia.curate.dedup import dedup
from castalia.curate.describe import describe
from castalia.curate.joining import merge, split
from castalia.curate.resharding import shard
from castalia.curate.verify import hash_list, read_hashes, verify
from castalia.data import IndexedDataset, IndexedDatasetWriter, split_documents
from castalia.data.seals import FILES

HASHES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "pythia_shard_hashes.txt"


def documents(*prefixes):
    return [document.tolist() for prefix in prefixes for document in IndexedDataset(prefix)[:]]


def faults(prefix, *args, **kwargs):
    """Sentences about what is wrong."""
    return [check.wrong for check in verify([prefix], *args, **kwargs) if not check.ok]


@pytest.fixture
def sequences(tmp_path):
    """A file of 5 sequences that are 2 documents."""
    with IndexedDatasetWriter(tmp_path / "grouped", np.uint16) as writer:
        for size in (1, 2, 3, 4, 5):
            writer.add(np.full(size, size))
        writer.doc_idx = np.array([0, 2, 5])
    return str(tmp_path / "grouped")


@pytest.fixture
def prepared(tmp_path):
    """A token file of `castalia prepare`, with its record."""
    lines = [{"text": text} for text in ("one", "two words", "", "drei")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([tmp_path / "a.jsonl"], tmp_path / "p", "bytes", append_eod=True)
    return str(tmp_path / "p")


# merge


@pytest.mark.parametrize("piece", [1, 4, 1 << 21])
def test_merge_keeps_the_order_of_inputs(token_file, tmp_path, sequences, monkeypatch, piece):
    monkeypatch.setattr(joining_module, "TOKENS_AT_A_TIME", piece)
    inputs = [
        token_file("b", [3, 0, 2]),
        sequences,
        token_file("a", [7], first=50),
        token_file("none", []),
    ]
    record = merge(inputs, tmp_path / "all")
    merged = IndexedDataset(tmp_path / "all")
    assert documents(tmp_path / "all") == documents(*inputs)
    assert merged.doc_idx.tolist() == [0, 1, 2, 3, 5, 8, 9]
    assert (record["documents"], record["tokens"], len(record["merged"])) == (9, 27, 4)
    assert faults(tmp_path / "all") == []


def test_merge_of_one_is_a_copy(token_file, tmp_path):
    whole = token_file("a", [3, 0, 2])
    merge([whole], tmp_path / "copy.bin")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == Path(whole + suffix).read_bytes()


def test_merge_leaves_no_rejects_of_an_earlier_output(token_file, tmp_path):
    prefix = token_file("a", [3])
    stale = tmp_path / "out.rejects.jsonl"
    stale.write_text("{}\n")
    merge([prefix], tmp_path / "out")
    assert not stale.exists()


def test_merge_reads_shards(token_file, tmp_path):
    whole = token_file("a", [3, 100, 2])
    shard(whole, tmp_path / "cut", size=33)
    merge([tmp_path / "cut" / "a", whole], tmp_path / "all")
    assert documents(tmp_path / "all") == documents(whole, whole)


def test_merge_mends_a_doc_idx_that_neox_left_wrong(token_file, tmp_path):
    bad = token_file("bad", [1, 2])
    with open(bad + ".idx", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<q", 1))
    with pytest.warns(UserWarning, match=r"bad\.idx: doc_idx does not run from 0 to 2"):
        merge([bad, bad], tmp_path / "all")
    assert IndexedDataset(tmp_path / "all").doc_idx.tolist() == [0, 1, 2, 3, 4]


def test_merge_of_documents_out_of_order_in_the_bin(token_file, tmp_path):
    odd = token_file("odd", [2, 3])
    with open(odd + ".idx", "r+b") as file:
        file.seek(34)
        file.write(struct.pack("<iiqq", 3, 2, 4, 0))
    merge([odd], tmp_path / "all")
    assert documents(tmp_path / "all") == [[2, 3, 4], [0, 1]]


def test_merge_refuses(token_file, tmp_path, prepared):
    small = token_file("small", [1])
    wide = token_file("wide", [1], np.int32)
    with pytest.raises(
        DataError,
        match=r"wide holds int32, but .*small holds uint16; prepare both with the same tokenizer",
    ):
        merge([small, wide], tmp_path / "out")
    with pytest.raises(ConfigError, match="small would be overwritten by the output"):
        merge([small], small + ".idx")
    other = json.loads(Path(prepared + ".json").read_text())
    other["tokenizer"]["sha256"] = "0" * 64
    del other[OWN_HASH]
    Path(small + ".json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"small and .*p were made with different tokenizers"):
        merge([prepared, small], tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge([], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_record_goes_along(prepared, tmp_path):
    merge([prepared, prepared], tmp_path / "twice")
    record = json.loads((tmp_path / "twice.json").read_text())
    assert (
        record["tokenizer"]["name"] == "bytes"
        and record["append_eod"] is True
        and record["vocab_size"] == 257
    )
    assert record["bin_sha256"] == hashlib.sha256((tmp_path / "twice.bin").read_bytes()).hexdigest()


# split


@pytest.mark.parametrize("shares", ["969, 30, 1", "1/1/1", "1", "0, 1"])
def test_split_cuts_where_training_does(token_file, tmp_path, shares):
    whole = token_file("a", [i % 7 for i in range(100)])
    records = split(whole, tmp_path / "out", shares=shares)
    expected = dict(zip(("train", "valid", "test"), split_documents(shares, 100), strict=True))
    kept = {name: span for name, span in expected.items() if len(span)}
    assert [record["prefix"] for record in records] == [f"out-{name}" for name in kept]
    for name, span in kept.items():
        assert documents(tmp_path / f"out-{name}") == documents(whole)[span.start : span.stop]
        assert faults(tmp_path / f"out-{name}") == []


@pytest.mark.parametrize("parts", [1, 3, 10])
def test_parts_merge_to_the_whole(token_file, tmp_path, parts):
    whole = token_file("a", [i % 7 for i in range(10)])
    records = split(whole, tmp_path / "out", parts=parts)
    assert len(records) == parts and {r["documents"] for r in records} <= {
        10 // parts,
        10 // parts + 1,
    }
    merge([tmp_path / r["prefix"] for r in records], tmp_path / "again")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == Path(whole + suffix).read_bytes()


def test_split_keeps_boundaries(sequences, tmp_path):
    split(sequences, tmp_path / "out", parts=2)
    assert [IndexedDataset(tmp_path / f"out-part{i}").doc_idx.tolist() for i in (0, 1)] == [
        [0, 2],
        [0, 3],
    ]
    split(sequences, tmp_path / "third", parts=3)
    boundaries = [IndexedDataset(tmp_path / f"third-part{i}").doc_idx.tolist() for i in range(3)]
    assert boundaries == [[0, 1], [0, 1, 2], [0, 2]]


def test_split_refuses(token_file, tmp_path):
    whole = token_file("a-train", [1, 2])
    for options in ({}, {"shares": "1", "parts": 2}):
        with pytest.raises(ConfigError, match="either --shares '969, 30, 1' or --parts N"):
            split(whole, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="--parts 3: expected 1 to 2"):
        split(whole, tmp_path / "out", parts=3)
    with pytest.raises(ConfigError, match="would be overwritten"):
        split(whole, tmp_path / "a", shares="1, 1")


# describe


def test_describe(token_file):
    facts = describe(IndexedDataset(token_file("a", [0, 1, 5, 7, 8, 30])))
    assert (facts.documents, facts.tokens, facts.bytes, facts.dtype, facts.empty) == (
        6,
        51,
        102,
        "uint16",
        1,
    )
    assert (facts.shortest, facts.mean, facts.median, facts.longest) == (0, 8.5, 6.0, 30)
    assert facts.histogram == [(0, 1), (1, 1), (2, 0), (4, 2), (8, 1), (16, 1)]
    assert sum(count for _, count in facts.histogram) == facts.documents


@pytest.mark.parametrize("sizes", [[], [0], [1], [2], [3, 4]])
def test_histogram_holds_every_document(token_file, sizes):
    facts = describe(IndexedDataset(token_file("a", sizes)))
    assert sum(count for _, count in facts.histogram) == len(sizes)


# verify


def test_pythias_list():
    if not HASHES.exists():
        pytest.skip("Pythia's list of shard hashes is not there")
    hashes = read_hashes(HASHES)
    base = "pile_0.87_deduped_text_document"
    assert list(hashes) == [f"{base}-{i:05}-of-00082.bin" for i in range(83)] + [f"{base}.idx"]
    assert (
        hashes[f"{base}.idx"] == "a659c5a57fa772fb6d3582c6e0b3a55c0c43b16ee8ea72ac6a70cebcdd35d669"
    )


def test_other_lists(tmp_path):
    path = tmp_path / "list"
    path.write_text(f"{'A' * 64} *d/x.bin\n\n{'b' * 64}  y z.idx\n")
    assert read_hashes(path) == {"x.bin": "a" * 64, "y z.idx": "b" * 64}
    for text, message in {
        "": "list is empty|list of hashes is empty",
        "x.bin 123\n": r"list:1: expected a file name and its SHA-256 .*, got 'x.bin 123'",
        f"x {'a' * 64}\nx {'b' * 64}\n": "list:2: a second hash for x, different from the first",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_hashes(path)
    with pytest.raises(DataError, match="cannot read the list"):
        read_hashes(tmp_path / "nowhere")


def test_a_prepared_file_is_right(prepared):
    checks = list(verify([prepared]))
    about = [check.about for check in checks]
    assert about == ["structure", "record", "ids", "index", "hash", "hash", "hash"]
    assert all(check.ok and not check.note for check in checks)
    files = {Path(check.file).name for check in checks if check.about == "hash"}
    assert files == {"p.bin", "p.idx", "p.documents.parquet"}


def test_every_flipped_bit_of_a_written_prefix_is_found(prepared, tmp_path):
    """In each file of every writer, and each file that is lost."""
    merge([prepared, prepared], tmp_path / "m")
    dedup([prepared], tmp_path / "d")
    split(tmp_path / "m", tmp_path / "s", parts=2)
    shard(prepared, tmp_path / "cut", size=9)
    prefixes = [prepared, *(str(tmp_path / name) for name in ("m", "d", "s-part0", "cut/p"))]
    dice = random.Random(0)
    for prefix in prefixes:
        assert not faults(prefix)
        paths = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}[.-]*"))
        assert len(paths) >= 4
        for path in paths:
            whole = path.read_bytes()
            for _ in range(3 if whole else 0):
                flipped = bytearray(whole)
                flipped[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
                path.write_bytes(flipped)
                assert faults(prefix), path
            path.unlink()
            assert faults(prefix) or path.suffix == ".json", path
            path.write_bytes(whole)
        assert not faults(prefix)


def test_files_of_older_versions_are_not_covered(prepared, token_file):
    record = json.loads(Path(prepared + ".json").read_text())
    del record[OWN_HASH], record[FILES]
    Path(prepared + ".json").write_text(json.dumps(record))
    notes = [check.note for check in verify([prepared]) if check.note]
    assert len(notes) == 3 and all(note.startswith("not covered: ") for note in notes)
    foreign = token_file("foreign", [1])
    assert [bool(check.note) for check in verify([foreign])] == [False, True, True]
    # A list beside it covers it, and is compared without being named.
    Path(foreign + ".sha256").write_text(
        "".join(f"{name} {digest}\n" for name, digest in hash_list(foreign).items())
    )
    assert not any(check.note for check in verify([foreign]))
    flip_token(foreign)
    assert any("SHA-256 is" in fault for fault in faults(foreign))


def flip_token(prefix):
    with open(prefix + ".bin", "r+b") as file:
        file.write(b"\x01\x00")


def huge_token(prefix):
    with open(prefix + ".bin", "r+b") as file:
        file.write(b"\xff\xff")


def more_bytes(prefix):
    with open(prefix + ".bin", "ab") as file:
        file.write(b"xx")


def overlap(prefix):
    with open(prefix + ".idx", "r+b") as file:
        file.seek(34 + 4 * 3 + 8)
        file.write(struct.pack("<q", 2))


def boundaries(prefix):
    with open(prefix + ".idx", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<q", 2))


def another_record(prefix):
    record = json.loads(Path(prefix + ".json").read_text()) | {"documents": 4}
    del record[OWN_HASH]  # as written by hand
    Path(prefix + ".json").write_text(json.dumps(record))


def broken_record(prefix):
    Path(prefix + ".json").write_text("[1]")


def no_index(prefix):
    os.remove(prefix + ".idx")


DAMAGE = {
    flip_token: r"^SHA-256 is \w{64}, expected \w{64}; copy or prepare the file again$",
    huge_token: "token id 65535 is outside the recorded vocabulary of 257 ids",
    more_bytes: r"p\.bin has 2 bytes after the last document",
    overlap: r"puts document 1 at byte 2, but the previous document ends at byte 8: .* overlap",
    boundaries: "doc_idx does not run from 0 to 3",
    another_record: "documents is 3, but the record says 4",
    broken_record: r"p\.json: not the JSON record of a token file: expected an object, got list",
    no_index: r"p\.idx: no such file",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found(prepared, damage):
    damage(prepared)
    assert re.search(DAMAGE[damage], "\n".join(faults(prepared)), re.MULTILINE)


@pytest.fixture
def published(token_file, tmp_path):
    """Shards with the list of their hashes."""
    shard(token_file("base", [5, 40, 60]), tmp_path / "cut", size=50)
    prefix = str(tmp_path / "cut" / "base")
    return prefix, hash_list(prefix)


def test_a_list_of_ones_own(published):
    prefix, hashes = published
    assert list(hashes) == [f"base-0000{i}-of-00004.bin" for i in range(5)] + ["base.idx"]
    checks = list(verify([prefix], hashes))
    assert [check.about for check in checks] == ["structure"] + ["hash"] * 6 and all(
        check.ok for check in checks
    )


def test_missing_and_wrong_files_are_failures(published):
    prefix, hashes = published
    os.remove(f"{prefix}-00003-of-00004.bin")
    with open(f"{prefix}-00001-of-00004.bin", "r+b") as file:
        file.write(b"\xff")
    wrong = {
        check.file.rpartition("/")[2]: check.wrong
        for check in verify([prefix], hashes)
        if not check.ok
    }
    assert list(wrong) == ["base", "base-00001-of-00004.bin", "base-00003-of-00004.bin"]
    assert (
        wrong["base-00003-of-00004.bin"] == "the list of hashes names it, but it is missing"
        and "SHA-256" in wrong["base-00001-of-00004.bin"]
    )


def test_what_the_list_does_not_name(published):
    prefix, hashes = published
    short = {name: digest for name, digest in hashes.items() if "00002" not in name[:11]}
    assert faults(prefix, short) == ["the list of hashes does not name it"]
    assert "names none of this prefix's files" in faults(prefix, {"other.bin": "0" * 64})[0]


def test_a_whole_file_under_a_list_of_shards(published, tmp_path):
    _, hashes = published
    whole = str(tmp_path / "base")
    assert faults(whole, hashes, shard_bytes=50) == []
    with open(whole + ".bin", "r+b") as file:
        file.seek(120)
        file.write(b"\xff\xff")
    wrong = [check.file for check in verify([whole], hashes, shard_bytes=50) if not check.ok]
    assert wrong == [f"{whole}.bin as base-00002-of-00004.bin"]


def test_nothing_to_hash(tmp_path):
    with pytest.raises(DataError, match="no such token file"):
        hash_list(tmp_path / "nothing")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_mutated_files_are_findings_and_never_crashes(prepared, suffix):
    rng = random.Random(1)
    whole = Path(prepared + suffix).read_bytes()
    detected = 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        Path(prepared + suffix).write_bytes(data)
        sentences = faults(prepared)
        detected += bool(sentences)
        assert all(isinstance(sentence, str) for sentence in sentences)
        assert sentences or suffix != ".bin"
    assert detected > 30
