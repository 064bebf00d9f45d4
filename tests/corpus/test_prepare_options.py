"""Options of `prepare`: keys, metadata, rejects, number of documents, shares, input formats."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from functools import partial

import ftfy
import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import encoding, prepare, provenance, read_documents
from castalia.corpus.provenance import read_provenance
from castalia.curate.joining import merge, split
from castalia.curate.verify import verify
from castalia.data import IndexedDataset
from castalia.tokenizers.tokenizer import Tokenizer

pyarrow = pytest.importorskip(
    "pyarrow", reason="pyarrow is not installed: pip install 'castalia[parquet]'"
)
parquet = pytest.importorskip("pyarrow.parquet")
SUFFIXES = (".bin", ".idx", ".documents.parquet")


def content(prefix):
    return [open(f"{prefix}{suffix}", "rb").read() for suffix in SUFFIXES]


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def texts(prefix):
    return [bytes(document.tolist()).decode() for document in IndexedDataset(prefix)]


@pytest.fixture
def file(tmp_path):
    """file(name, bytes): its path."""

    def write(name, data):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


@pytest.mark.parametrize("workers", ["1", "2"])
def test_pandas_is_not_imported(file, tmp_path, workers):
    """Importing it takes as long as all else that a process does to start."""
    corpus = file("a.jsonl", lines({"text": "a", "id": 1}, {"text": "b"}, {"text": "c", "id": "ü"}))
    file(
        "other/pandas.py",
        f"open({str(tmp_path / 'seen')!r}, 'w').close()\nraise ImportError\n".encode(),
    )
    path = os.pathsep.join([str(tmp_path / "other"), os.environ.get("PYTHONPATH", "")])
    run = partial(subprocess.run, env={**os.environ, "PYTHONPATH": path})
    job = [
        sys.executable,
        "-m",
        "castalia",
        "prepare",
        corpus,
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "out",
    ]
    run([*job, "--workers", workers], check=True)
    assert [read_provenance(str(tmp_path / "out"), i)["id"] for i in range(3)] == ["1", None, "ü"]
    assert not (tmp_path / "seen").exists()
    run([sys.executable, "-c", "import pandas"], check=False)
    assert (tmp_path / "seen").exists()


def test_several_keys_are_several_outputs(file, tmp_path):
    path = file(
        "a.jsonl", lines({"q": "one", "a": ""}, {"q": "zwei", "a": "2"}, {"q": "", "a": "3"})
    )
    done = prepare([path], tmp_path / "out", "bytes", keys=("q", "a"))
    assert done.prefixes == (f"{tmp_path}/out_q_document", f"{tmp_path}/out_a_document")
    assert (texts(done.prefixes[0]), texts(done.prefixes[1]), done.empty) == (
        ["one", "zwei"],
        ["2", "3"],
        2,
    )
    assert [read_provenance(done.prefixes[1], i)["line"] for i in range(2)] == [2, 3]


def test_where_each_document_came_from(file, tmp_path):
    first = {"text": "ä", "id": 7, "meta": {"set": "x"}, "n": 12345678901234567890123}
    data = lines(first, {"text": ""}) + b"\n" + lines({"text": "b", "n": 0.1})
    paths = [
        file("a.jsonl", data),
        file("b.jsonl.gz", gzip.compress(lines({"text": "c", "meta": "y"}))),
        file("c.txt", b"t"),
    ]
    prepare(paths, tmp_path / "out", "bytes", keep=("meta", "n"), append_eod=True, part_bytes=30)
    entries = [read_provenance(str(tmp_path / "out"), i) for i in range(4)]
    assert [(f["source"], f["line"], f["tokens"]) for f in entries] == [
        (str(paths[0]), 1, 3),
        (str(paths[0]), 4, 2),
        (str(paths[1]), 1, 2),
        (str(paths[2]), 1, 2),
    ]
    assert [(f["id"], f["meta"], f["n"]) for f in entries] == [
        ("7", '{"set": "x"}', "12345678901234567890123"),
        (None, None, "0.1"),
        (None, "y", None),
        (None, None, None),
    ]
    for one in entries[:2]:
        line = json.loads(data[one["start"] : one["stop"]])["text"].encode()
        assert hashlib.sha256(line).hexdigest()[:32] == one["hash"]
    with pytest.raises(DataError, match="lacks document 4"):
        read_provenance(str(tmp_path / "out"), 4)
    (tmp_path / "out.documents.parquet").unlink()
    assert read_provenance(str(tmp_path / "out"), 0) is None


def test_metadata_of_parquet_and_a_folder_of_datasets(tmp_path):
    table = pyarrow.table({"text": ["one", "", "three"], "id": ["x", "y", "z"], "n": [1, 2, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    folder = tmp_path / "set"
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    (folder / "dataset_info.json").write_text("{}")
    for i, path in enumerate((tmp_path / "a.parquet", folder)):
        prefix = str(tmp_path / f"out{i}")
        prepare([path], prefix, "bytes", keep=("n",), part_bytes=1)
        assert texts(prefix) == ["one", "three"]
        entries = [read_provenance(prefix, i) for i in range(2)]
        assert [(f["id"], f["n"], f["line"], f["start"]) for f in entries] == [
            ("x", "1", 0, None),
            ("z", None, 2, None),
        ]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["set"]}')
    assert list(read_documents([tmp_path])) == ["one", "", "three"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["set", "other"]}')
    with pytest.raises(DataError, match=r"splits; name the one to read: .*set, .*other"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("name", ["../a.arrow", "/etc/passwd", "..", "", 5, "in/../../x"])
def test_manifests_that_lead_out_are_refused(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"leads out of the folder; such manifests are refused"):
        list(read_documents([tmp_path]))


def test_bad_documents_are_rejected_with_their_places(file, tmp_path):
    good = [lines({"text": f"good {i}"}) for i in range(40)]
    bad = {5: b'{"text": 5}\n', 17: b"\xff\xfe\n", 30: b'{"text": "cut', 31: b'{"txt": "x"}\n'}
    data = b"".join(bad.get(i, good[i] if i != 30 else b"") for i in range(40))
    paths = [
        file("a.jsonl", data),
        file("b.txt", b"caf\xe9"),
        file("c.jsonl.gz", gzip.compress(good[0] * 9)[:-9]),
    ]
    for workers, size in ((1, 1 << 20), (2, 100)):
        options = {"reject": True, "workers": workers, "part_bytes": size}
        done = prepare(paths, tmp_path / "out", "bytes", overwrite=True, **options)
        rejects = [
            json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()
        ]
        assert [(t["file"], t["line"], t["reason"][:16]) for t in rejects] == [
            (str(paths[0]), 6, "'text' must be a"),
            (str(paths[0]), 18, "not UTF-8: byte "),
            (str(paths[0]), 31, "invalid JSON at "),
            (str(paths[1]), 1, "not UTF-8: byte "),
            (str(paths[2]), None, f"{paths[2]}: cannot be read"[:16]),
        ]
        assert (done.rejected, done.documents) == (5, 45)
        assert rejects[0]["text"] == '{"text": 5}\n'
    with pytest.raises(DataError, match=r"a\.jsonl:6: 'text' must be a string"):
        prepare(paths, tmp_path / "stop", "bytes", workers=2, part_bytes=100)


@pytest.mark.parametrize("size", [60, 1 << 20])
def test_a_number_of_documents(file, tmp_path, size):
    path = file("a.jsonl", b"".join(lines({"text": f"document {i}"}) for i in range(50)))
    for wanted in (1, 3, 49, 50, 99):
        options = {"max_documents": wanted, "part_bytes": size}
        done = prepare([path], tmp_path / "out", "bytes", overwrite=True, **options)
        assert texts(tmp_path / "out") == [f"document {i}" for i in range(min(wanted, 50))]
        assert done.documents == min(wanted, 50)


def test_ftfy(file, tmp_path):
    prepare(
        [file("a.jsonl", lines({"text": "schÃ¶n"})), file("b.txt", "â€œok".encode())],
        tmp_path / "o",
        "bytes",
        ftfy=True,
    )
    assert (
        texts(tmp_path / "o")
        == [ftfy.fix_text("schÃ¶n"), ftfy.fix_text("â€œok")]
        == ["schön", '"ok']
    )


def test_shares_merged_are_one_run(file, tmp_path):
    rows = [{"text": f"document {i} " + "x" * (i % 90), "id": i} for i in range(400)]
    paths = [
        file("a.jsonl", lines(*rows[:150])),
        file("b.jsonl.gz", gzip.compress(lines(*rows[150:250]))),
    ]
    table = pyarrow.table(
        {"text": [r["text"] for r in rows[250:]], "id": [r["id"] for r in rows[250:]]}
    )
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=20)
    paths.append(tmp_path / "c.parquet")
    prepare(paths, tmp_path / "whole", "bytes", append_eod=True)
    for count in (1, 2, 7, 40):
        prefixes = [tmp_path / f"s{i}-{count}" for i in range(count)]
        for i in range(count):
            prepare(paths, prefixes[i], "bytes", append_eod=True, shard=(i, count), part_bytes=500)
        merge(prefixes, tmp_path / "merged", overwrite=True)
        assert content(tmp_path / "merged") == content(tmp_path / "whole")


@pytest.mark.parametrize("group", [7, 1 << 17])
def test_an_index_split_and_merged_again(file, tmp_path, monkeypatch, group):
    monkeypatch.setattr(provenance, "GROUP_ROWS", group)
    prepare(
        [file("a.jsonl", lines(*({"text": f"{i}", "id": i} for i in range(50))))],
        tmp_path / "whole",
        "bytes",
    )
    split(tmp_path / "whole", tmp_path / "cut", parts=3)
    assert [read_provenance(f"{tmp_path}/cut-part1", i)["id"] for i in (0, 16)] == ["16", "32"]
    merge([tmp_path / f"cut-part{i}" for i in range(3)], tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "whole")


def test_verify_holds_the_index_against_the_tokens(file, tmp_path):
    path = file("a.jsonl", lines({"text": "one"}, {"text": "three"}))
    for name, inputs in (
        ("a", [path]),
        ("b", [path, path]),
        ("c", [file("c.txt", b"x"), file("d.txt", b"yz")]),
    ):
        prepare(inputs, tmp_path / name, "bytes")
    index = tmp_path / "a.documents.parquet"
    faults = lambda: [check.wrong for check in verify([tmp_path / "a"]) if check.about == "index"]  # noqa: E731
    assert faults() == [None]
    for other, wrong in (
        ("b", "it describes 4 documents, but the .idx has 2"),
        ("c", "document 0 has 1 tokens, but 3 in the .idx"),
    ):
        index.write_bytes((tmp_path / f"{other}.documents.parquet").read_bytes())
        assert faults() == [wrong]
    index.write_bytes(b"PAR1")
    assert faults()[0].startswith("cannot be read")
    index.unlink()
    assert faults() == []


def test_shares_are_merged_all_and_in_their_order(file, tmp_path):
    """`merge share*` gives share 10 before share 2, and a task of an array may have failed."""
    path = file("a.jsonl", lines(*({"text": f"{i:050}"} for i in range(30))))
    for i in range(12):
        prepare([path], tmp_path / f"share{i}", "bytes", shard=(i, 12), part_bytes=100)
    prepare([path], tmp_path / "whole", "bytes")
    shares = [tmp_path / f"share{i}" for i in range(12)]
    for wrong, said in (
        (
            sorted(shares),
            r"share10 is share 10/12, expected share 2/12; name all shares",
        ),
        (shares[1:], r"share1 is share 1/12, expected share 0/12"),
        (shares[:5] + shares[6:], r"share6 is share 6/12, expected share 5/12"),
        (shares[:-1], r"share 11/12 is missing after .*share10"),
        ([*shares[:2], tmp_path / "whole"], r"whole is share 0/1, expected share 2/12"),
    ):
        with pytest.raises(DataError, match=said):
            merge(wrong, tmp_path / "merged")
    merge([tmp_path / "whole", *shares, *shares], tmp_path / "merged")
    assert texts(tmp_path / "merged") == texts(tmp_path / "whole") * 3
    path.write_bytes(path.read_bytes() + lines({"text": "more"}))
    prepare([path], shares[3], "bytes", shard=(3, 12), part_bytes=100, overwrite=True)
    with pytest.raises(
        DataError,
        match=r"share3: share 3/12 was prepared from other inputs than the share before it",
    ):
        merge(shares, tmp_path / "merged")


def test_a_share_is_not_written_over_another(file, tmp_path):
    path = file("a.jsonl", lines(*({"text": "x" * 50} for _ in range(9))))
    prepare([path], tmp_path / "out", "bytes", shard=(0, 2), part_bytes=100)
    prepare([path], tmp_path / "out", "bytes", shard=(0, 2), part_bytes=100)
    with pytest.raises(ConfigError, match=r"out holds share 0/2 already, not 1/2; give each share"):
        prepare([path], tmp_path / "out", "bytes", shard=(1, 2), part_bytes=100)
    prepare([path], tmp_path / "out", "bytes", shard=(1, 2), part_bytes=100, overwrite=True)


def test_memory_and_other_urls(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/in/a.jsonl", lines({"text": "one"}, {"text": "two"}))
    system.pipe("/in/b.jsonl.gz", gzip.compress(lines({"text": "three"})))
    for inputs in (
        ["memory://in/a.jsonl", "memory://in/b.jsonl.gz"],
        ["memory://in"],
        ["memory://in/*.jsonl*"],
    ):
        prepare(inputs, tmp_path / "out", "bytes", workers=2, overwrite=True)
        assert texts(tmp_path / "out") == ["one", "two", "three"]
    assert read_provenance(str(tmp_path / "out"), 2)["source"].endswith("in/b.jsonl.gz")
    with pytest.raises(DataError, match=r"memory://gone\.txt: no such file"):
        list(read_documents(["memory://gone.txt"]))
    with pytest.raises(DataError, match="nonsense://x: cannot be opened"):
        list(read_documents(["nonsense://x"]))


def test_options_that_do_not_go_together(file, tmp_path, monkeypatch):
    path = file("a.jsonl", lines({"text": "x"}))
    wrong = {
        "shares count from 0": {"shard": (2, 2)},
        "--num-docs and --shard": {"max_documents": 3, "shard": (0, 2)},
        "the document index has columns of that name": {"keep": ("line",)},
        "a key is repeated": {"keys": ("a", "a")},
        "unknown --engine 'spark'": {"engine": "spark"},
    }
    for message, choices in wrong.items():
        with pytest.raises(ConfigError, match=message):
            prepare([path], tmp_path / "out", "bytes", **choices)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="--keep needs the document index"):
        prepare([path], tmp_path / "out", "bytes", keep=("id",))
    prepare([path], tmp_path / "out", "bytes")
    assert not (tmp_path / "out.documents.parquet").exists()


class Lying:
    """gigatoken as it is, but for the word that makes it lie, which no probe has."""

    def __init__(self, quick):
        self.quick = quick

    def __call__(self, texts):
        ids, sizes = self.quick(texts)
        return (ids + 1 if any(b"liar" in text for text in texts) else ids), sizes


def test_a_part_in_which_gigatoken_differs_is_encoded_again(file, tmp_path, monkeypatch):
    from castalia.data import train_tokenizer

    pytest.importorskip("gigatoken", reason="gigatoken has no wheel here")
    train_tokenizer(["the liar lies again and again " * 20], 300, tmp_path / "t.json")
    path = file("a.jsonl", lines(*({"text": f"word {i}" + " liar" * (i == 30)} for i in range(60))))
    prepare([path], tmp_path / "slow", tmp_path / "t.json", fast=False, part_bytes=400)
    real = encoding.gigatoken

    def gigatoken(tokenizer):
        quick, why = real(tokenizer)
        return Lying(quick), why

    monkeypatch.setattr(encoding, "gigatoken", gigatoken)
    with pytest.warns(
        UserWarning, match="gigatoken and tokenizers differed in 1 parts, which were encoded again"
    ):
        done = prepare([path], tmp_path / "out", tmp_path / "t.json", part_bytes=400)
    assert (done.again, done.by) == (1, "gigatoken, tokenizers")
    assert content(tmp_path / "out") == content(tmp_path / "slow")


def test_a_tokenizer_that_gigatoken_reads_otherwise_is_not_given_to_it(monkeypatch):
    pytest.importorskip("gigatoken", reason="gigatoken has no wheel here")
    from castalia.data import load_tokenizer

    plain = Tokenizer(load_tokenizer("bytes").text)
    assert encoding.Encoder(plain).by == "gigatoken"
    monkeypatch.setattr(
        encoding, "fast_path_of", lambda inner, real=encoding.fast_path_of: Lying(real(inner))
    )
    monkeypatch.setattr(encoding, "PROBES", ("the liar",))
    encoder = encoding.Encoder(plain)
    assert (encoder.by, encoder.fallback_reason) == (
        "tokenizers",
        "gigatoken and tokenizers give different ids for the probe texts",
    )


def test_without_gigatoken_and_orjson_the_bytes_are_the_same(file, tmp_path, monkeypatch):
    from castalia.corpus import documents
    from castalia.data import train_tokenizer

    train_tokenizer(["the same again and again " * 20], 300, tmp_path / "t.json")
    texts = ["naïve café ", "\u2028 line 1\n", "x" * 50, '{} [] \\ " 3.14 ']
    path = file("a.jsonl", lines(*({"id": 2**70 + i, "text": t * 9} for i, t in enumerate(texts))))
    usual = prepare([path], tmp_path / "usual", tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setattr(documents, "orjson", None)
    plain = prepare([path], tmp_path / "plain", tmp_path / "t.json")
    assert plain.by == "tokenizers" and "pip install gigatoken" in (plain.fallback_reason or "")
    assert content(tmp_path / "plain") == content(tmp_path / "usual")
    assert usual.tokens == plain.tokens > 0
