"""`castalia data …`: what each verb prints and writes, and how it fails."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from castalia.cli import batches
from castalia.corpus import prepare
from castalia.data import DataConfig, IndexedDataset, IndexedDatasetWriter, build_rows
from castalia.monitor.display import size_text


@pytest.fixture
def run(monkeypatch, command, tmp_path):
    """run(*words): `castalia data WORDS` in a folder with the token file `c`; (status, out,
    err)."""
    monkeypatch.chdir(tmp_path)
    texts = ["one", "two words", "a third document, longer", "é"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(["c.jsonl"], "c", "bytes", append_eod=True)

    return functools.partial(command, "data")


def test_inspect(run):
    code, out, err = run("inspect", "c", "--document", "2", "--tokenizer", "bytes")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "c: 4 documents, 42 tokens as uint16, 84 B"
    assert lines[1] == "tokens a document: least 3, mean 10.5, median 7.0, most 25; 0 empty"
    assert [line.split() for line in lines[2:6]] == [
        ["2-3", "1", "#" * 40],
        ["4-7", "1", "#" * 40],
        ["8-15", "1", "#" * 40],
        ["16-31", "1", "#" * 40],
    ]
    assert lines[7] == "document 2, 25 tokens"
    assert lines[8].startswith("from c.jsonl:3  start=") and " tokens=25 hash=" in lines[8]
    assert lines[9:] == ["a third document, longer<|endoftext|>"]


def test_inspect_says_what_index_maps_are_kept(run, monkeypatch):
    monkeypatch.setattr("castalia.data.order_cache.WORTH_BYTES", 0)
    sizes = {"seed": 1, "batch_size": 1, "steps": 2, "eval_every": None, "eval_batches": 1}
    build_rows(DataConfig(seq_length=8, train=["c"]), **sizes)
    size = sum(path.stat().st_size for path in Path("c.order").glob("*.safetensors"))
    assert (
        run("inspect", "c")[1].splitlines()[2]
        == f"index maps: 1 files, {size_text(size)} in c.order"
    )


def test_inspect_as_json_and_without_a_tokenizer(run):
    _, out, _ = run("inspect", "c.bin", "--document", "-1", "--json")
    found = json.loads(out)
    assert found["document"].pop("from")["line"] == 4
    assert found["document"] == {"number": 3, "tokens": 3, "ids": [0xC3, 0xA9, 256]}
    assert (found["documents"], found["longest"], found["shards"]) == (4, 25, 0)
    assert run("inspect", "c", "--document", "0")[1].endswith("\n111 110 101 256\n")


def test_inspect_has_no_such_document(run):
    code, out, err = run("inspect", "c", "--document", "4")
    assert (code, out, err) == (2, "", "castalia: error: --document 4: c has 4 documents, 0 to 3\n")


def test_count(run):
    assert run("count", "c")[1] == "c: 4 documents, 42 tokens as uint16\n"
    assert run("count", "c", "c")[1].splitlines()[-1] == "all: 8 documents, 84 tokens"
    assert json.loads(run("count", "c", "c", "--json")[1])["tokens"] == 84


def test_shards_from_end_to_end(run, tmp_path):
    code, out, _ = run("shard", "c", "--bytes", "25", "--output", "cut")
    assert (code, out) == (
        0,
        "cut/c-00000-of-00003.bin to c-00003-of-00003.bin: 4 shards of 25 bytes, the last may be"
        " shorter\n",
    )
    assert "in 4 shards" in run("inspect", "cut/c")[1]
    assert run("verify", "cut/c", "--write-hashes", "hashes.txt")[0] == 0
    code, out, _ = run("verify", "cut/c-00000-of-00003.bin", "--hashes", "hashes.txt")
    assert code == 0 and out.count("ok  ") == 12 and "FAIL" not in out
    code, out, _ = run("unshard", "cut/c", "--output", "joined", "--hashes", "hashes.txt", "--json")
    assert (code, json.loads(out)["bytes"], json.loads(out)["path"]) == (0, 84, "joined/c.bin")
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / "joined" / f"c{suffix}").read_bytes() == (
            tmp_path / f"c{suffix}"
        ).read_bytes()
    code, out, _ = run("unshard", "cut/c", "--output", "joined")
    assert code == 0 and out.startswith(
        "joined/c.bin: 4 shards, 84 bytes, 84 of them from before, SHA-256 "
    )


def test_verify_fails(run, tmp_path):
    run("shard", "c", "--bytes", "25", "--output", "cut")
    run("verify", "cut/c", "--write-hashes", "hashes.txt")
    os.remove(tmp_path / "cut" / "c-00001-of-00003.bin")
    code, out, err = run("verify", "cut/c", "--hashes", "hashes.txt")
    assert (code, err) == (1, "castalia: error: 2 of 7 checks failed\n")
    assert (
        "FAIL hash      cut/c-00001-of-00003.bin: the list of hashes names it, but it is missing\n"
        in out
    )
    found = [
        json.loads(line)
        for line in run("verify", "cut/c", "--hashes", "hashes.txt", "--json")[1].splitlines()
    ]
    assert [check["ok"] for check in found] == [False, True, False, True, True, True, True]
    assert run("verify", "c", "--hashes", "a", "--write-hashes", "b")[0] == 2


def test_merge_and_split(run):
    assert (
        run("merge", "c", "c", "--output", "out/two")[1]
        == "out/two: 8 documents, 84 tokens as uint16\n"
    )
    assert run("split", "out/two", "--shares", "1,1", "--output", "out/s")[1].splitlines() == [
        "out/s-train: 4 documents, 42 tokens as uint16",
        "out/s-valid: 4 documents, 42 tokens as uint16",
    ]
    assert np.array_equal(IndexedDataset("out/s-valid")[3], IndexedDataset("c")[3])
    found = [
        json.loads(line)
        for line in run("split", "c", "--parts", "2", "--output", "out/p", "--json")[1].splitlines()
    ]
    assert [record["split_from"]["stop"] for record in found] == [2, 4]


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "no"),
        ("count", "no"),
        ("shard", "no", "--output", "o"),
        ("unshard", "no"),
        ("merge", "no", "--output", "o"),
        ("split", "no", "--parts", "1", "--output", "o"),
    ],
)
def test_a_missing_file_is_one_sentence(run, words):
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert (
        err == "castalia: error: no.idx: no such file; a token file is a pair PREFIX.bin and"
        " PREFIX.idx\n"
    )


def test_a_text_or_a_folder_in_place_of_a_token_file(run):
    Path("corpus.jsonl").write_text('{"text": "a"}\n')
    Path("folder").mkdir()
    Path("folder/c.idx").touch()
    for word, hint in {
        "corpus.jsonl": "corpus.jsonl is no token file, and `castalia prepare corpus.jsonl` makes",
        "folder": "folder is a folder, in which is folder/c",
    }.items():
        code, _, err = run("inspect", word)
        assert code == 1 and f"{word}.idx: no such file" in err and hint in err


def test_unshard_of_a_whole_file(run):
    code, _, err = run("unshard", "c")
    assert (
        code == 2 and err == "castalia: error: c is a whole .bin without shards; nothing to join\n"
    )


OVERRIDES = [
    "debug",
    "data.train=c",
    "data.seq_length=8",
    "train.batch_size=2",
    "train.micro_batch_size=null",
    "train.steps=3",
]


def test_view(run, tmp_path):
    code, out, err = run("view", *OVERRIDES, "data.tokenizer=bytes", "--steps", "1:3")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(line["step"], line["row"], line["source"]) for line in lines] == [
        (1, 0, "c"),
        (1, 1, "c"),
        (2, 0, "c"),
        (2, 1, "c"),
    ]
    assert "".join(found["text"] for found in lines[0]["documents"]) == lines[0]["text"]
    code, out, _ = run(
        "view",
        *OVERRIDES,
        "data.tokenizer=null",
        "--steps",
        "1:3",
        "--ids",
        "ids.npy",
        "--jsonl",
        "rows.jsonl",
    )
    assert code == 0 and [line.rpartition(" ")[0] for line in out.splitlines()] == [
        "step 1: 2 rows, rows_hash",
        "step 2: 2 rows, rows_hash",
    ]
    assert np.load(tmp_path / "ids.npy").shape == (4, 9)
    without_text = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert without_text[0]["documents"][0].keys() == {"document", "start", "length", "from"}


def test_materialize_and_read_back(run, tmp_path):
    code, out, _ = run("materialize", *OVERRIDES, "--steps", ":", "--output", "ready")
    assert (code, out) == (0, "ready: 6 documents, 54 tokens as uint16\n")
    record = json.loads((tmp_path / "ready.json").read_text())
    assert record["rows_of"] == {"first_step": 0, "stop_step": 3, "batch_size": 2}
    assert run("verify", "ready")[0] == 0
    run("view", *OVERRIDES, "--steps", "0:3", "--ids", "a.npy")
    run(
        "view",
        *OVERRIDES,
        "data.train=ready",
        "data.order=file",
        "--steps",
        "0:3",
        "--ids",
        "b.npy",
    )
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_pythias_batches_out_of_shards_of_ready_rows(run, tmp_path):
    # batch_viewer.py takes items [B·start, B·(end + 1)) of the rows, reshaped to (rows, 2049).
    rows = np.random.default_rng(0).integers(0, 50254, (12, 2049)).astype(np.uint16)
    with IndexedDatasetWriter("document", np.uint16) as writer:
        for row in rows:
            writer.add(row)
    run("shard", "document", "--bytes", "9999", "--output", "hub")
    config = [
        "pythia-160m",
        "data.train=hub/document",
        "data.order=file",
        "train.batch_size=2",
        "train.steps=6",
    ]
    code, _, err = run("view", *config, "--steps", "1:4", "--ids", "indicies.npy")
    assert (code, err) == (0, "")
    found = np.load("indicies.npy")
    assert found.dtype == np.uint16 and np.array_equal(found, rows[2 * 1 : 2 * (3 + 1)])


def test_view_shows_what_a_run_trained_on(run, command, tmp_path, monkeypatch):
    code, _, said = command("train", *OVERRIDES, "output=r")
    assert code == 0, said
    metrics = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    trained = {line["step"] - 1: line["rows_hash"] for line in metrics if "rows_hash" in line}
    out = run("view", "r/config.yaml", "--steps", ":", "--ids", "ids.npy")[1]
    lines = [f"step {step}: 2 rows, rows_hash {trained[step]}" for step in range(3)]
    assert out.splitlines() == lines
    # Of more steps than anybody reads, the first ones.
    monkeypatch.setattr(batches, "HASHES", 2)
    out = run("view", "r", "--steps", ":", "--ids", "ids.npy")[1]
    assert out.splitlines() == [*lines[:2], "and 1 more steps; --verify compares their hashes"]
    # The folder of the run is a config as well, and one step may be asked for as --step.
    out = run("view", "r", "--step", "2", "--ids", "ids.npy")[1]
    assert out.splitlines() == lines[2:]
    # From anywhere: the paths in its config are relative to where the run was started.
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    out = run("view", "../../r/config.yaml", "--step", "2", "--ids", "ids.npy")[1]
    assert out.splitlines() == lines[2:]


@pytest.mark.parametrize("verb", [["view"], ["materialize", "--output", "o"]])
def test_steps_beyond_the_run(run, verb):
    code, out, err = run(*verb, *OVERRIDES, "--steps", "2:4")
    assert (code, out) == (2, "")
    assert err == "castalia: error: --steps 2:4: steps 2 to 3, but the run has steps 0 to 2\n"
