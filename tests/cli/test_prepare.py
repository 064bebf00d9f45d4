"""The command `castalia prepare`: what it writes, what it says, and how it fails."""

import functools
import json
import os
import subprocess
import sys

import pytest

from castalia.data import IndexedDataset, load_tokenizer


@pytest.fixture
def run(monkeypatch, command, tmp_path):
    """run(*words): `castalia prepare` in an own folder; (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    return functools.partial(command, "prepare")


def test_summary(run, tmp_path):
    code, out, err = run("a.jsonl", "--tokenizer", "bytes", "--output", "data/x", "--append-eod")
    assert (code, err) == (0, "")
    assert out.startswith(
        "data/x: 2 documents (1 empty skipped), 10 tokens as uint16, 8 B of text in "
    )
    assert out.endswith("B/s), encoded by numpy\n") and "MB" not in out
    assert bytes(IndexedDataset(tmp_path / "data" / "x")[1][:-1].tolist()) == b"three"
    assert sorted(os.listdir(tmp_path / "data")) == [
        "x.bin",
        "x.documents.parquet",
        "x.idx",
        "x.json",
    ]


def test_json_summary(run):
    code, out, _ = run(
        "a.jsonl", "--tokenizer", "bytes", "--output", "x", "--json", "--workers", "1"
    )
    found = json.loads(out)
    assert (code, found["documents"], found["tokens"], found["empty"]) == (0, 2, 8, 1)


def test_rejects_keys_and_metadata(run, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"q": "x", "a": "y", "n": 3}\n{"q": 1}\n')
    words = ["--key", "q", "--key", "a", "--keep", "n", "--on-error", "reject", "--num-docs", "5"]
    code, out, _ = run("b.jsonl", "--tokenizer", "bytes", "--output", "o", *words)
    assert code == 0
    assert out.startswith(
        "o_q_document, o_a_document: 2 documents (1 rejected, see o.rejects.jsonl), 2 tokens as"
        " uint16"
    )
    assert json.loads((tmp_path / "o.rejects.jsonl").read_text())["line"] == 2
    assert run("--list")[1].splitlines()[1].startswith("enwik8 ")


def test_plain_lines_of_progress(monkeypatch, capsys):
    from castalia.terminal import progress

    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    lines = progress.PlainLines("prepare", 200_000_000)
    lines(50_000_000, 12_000_000)
    assert capsys.readouterr().err.startswith("prepare  25.0%  47.7 MiB of 191 MiB  tok/s ")
    assert lines.line(10.0) == "prepare  25.0%  47.7 MiB of 191 MiB  tok/s 1.2M  eta 30s"


def test_another_key_and_a_trained_tokenizer(run, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "to be or not to be " * 30}) + "\n")
    code, _, _ = run(
        "b.jsonl",
        "--key",
        "body",
        "--train-tokenizer",
        "265",
        "--tokenizer",
        "t.json",
        "--output",
        "x",
    )
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (code, tokenizer.vocab_size) == (0, 265)
    assert tokenizer.decode(IndexedDataset(tmp_path / "x")[0]) == "to be or not to be " * 30


BAD = {
    "empty.txt": (b"", "empty.txt: is empty"),
    "latin.txt": (
        b"caf\xe9",
        "latin.txt:1: not UTF-8: byte 0xe9 at offset 3; convert the file to UTF-8",
    ),
    "key.jsonl": (
        b'{"text": "x"}\n{"body": "x"}\n',
        "key.jsonl:2: the document lacks the key 'text'; keys: body",
    ),
    "broken.jsonl": (b'{"text": "x"}\n\n{"text": \n', "broken.jsonl:3: invalid JSON at column 10"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\x00", "cut.jsonl.gz: cannot be read: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    code, out, err = run("a.jsonl", name, "--tokenizer", "bytes", "--output", "x")
    assert (code, out) == (1, "")
    assert err.startswith(f"castalia: error: {message}")
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.txt", "--tokenizer", "bytes", "--output", "x"], "gone.txt: no such file or folder"),
        (
            ["a.jsonl", "--tokenizer", "gone.json", "--output", "x"],
            "gone.json: no such tokenizer file",
        ),
        (
            ["a.jsonl", "--tokenizer", "bytes", "--output", "a.jsonl/x"],
            "cannot write a.jsonl/x.bin: ",
        ),
        (
            ["--tokenizer", "bytes"],
            "castalia prepare needs INPUT, --output; see castalia prepare --help",
        ),
        (
            ["a.jsonl", "--tokenizer", "bytes", "--output", "x", "--on-error", "skip"],
            "--on-error skip: expected stop or",
        ),
        (
            ["a.jsonl", "--tokenizer", "bytes", "--output", "x", "--shard", "1of2"],
            "--shard 1of2: expected I/N, such as",
        ),
        (
            ["a.jsonl", "--tokenizer", "bytes", "--output", "x", "--shard", "2/2"],
            "--shard 2/2: shares count from 0",
        ),
        (
            ["pile", "--tokenizer", "bytes", "--output", "x"],
            "https://the-eye.eu/public/AI/pile/train/00.jsonl.zst: the-eye",
        ),
        (
            ["a.jsonl", "--tokenizer", "t.json", "--output", "x", "--train-tokenizer", "9"],
            "a byte-level BPE needs",
        ),
    ],
)
def test_bad_command(run, tmp_path, words, message):
    code, _, err = run(*words)
    assert code in (1, 2)
    assert err.startswith(f"castalia: error: {message}")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk"
)
def test_a_full_disk(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        (tmp_path / "big.txt").write_text("x" * 200_000)
        code, _, err = run("big.txt", "--tokenizer", "bytes", "--output", "disk/x")
        assert code == 1
        assert err.startswith(
            "castalia: error: cannot write disk/x.bin: No space left on device; free space"
        )
        assert os.listdir(disk) == []
        subprocess.run(["mount", "-o", "remount,size=2M", str(disk)], check=True)
        assert run("big.txt", "--tokenizer", "bytes", "--output", "disk/x")[0] == 0
        assert bytes(IndexedDataset(disk / "x")[0].tolist()) == b"x" * 200_000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_processes_from_the_shell(run, tmp_path):
    """Worker processes start from the installed command too."""
    (tmp_path / "many.jsonl").write_text(
        "".join(f'{{"text": "document {i}"}}\n' for i in range(9000))
    )
    command = [
        "-m",
        "castalia",
        "prepare",
        "many.jsonl",
        "--tokenizer",
        "bytes",
        "--output",
        "x",
        "--workers",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("x: 9,000 documents, ")
    assert bytes(IndexedDataset(tmp_path / "x")[8999].tolist()) == b"document 8999"


def test_conversations(run, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    pair = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": pair, "score": 0.5}) + "\n")
    words = ["c.jsonl", "--tokenizer", "bytes", "--output", "o", "--chat-template", "t.jinja"]
    code, out, _ = run(*words, "--chat", "messages", "--reward-key", "score")
    assert code == 0
    assert out.startswith(
        "o_messages_document, o_messages_label_document, o_messages_reward_document: 1 documents, 8"
    )
    labels = IndexedDataset(tmp_path / "o_messages_label_document")[0].tolist()
    assert labels == [-100] * 5 + [ord("2"), ord("\n"), 256]
    assert IndexedDataset(tmp_path / "o_messages_reward_document")[0].tolist() == [0.5]
    both = [*words, "--chat", "messages", "--generation-role", "user,assistant"]
    code, _, err = run(*both)
    assert code == 2 and 'chat.roles ["assistant"], now ["user", "assistant"]' in err
    assert run(*both, "--overwrite")[0] == 0
    assert run(*both)[1].startswith("an earlier run of the same command has finished; nothing")
    assert -100 not in IndexedDataset(tmp_path / "o_messages_label_document")[0]
    code, _, err = run(*words, "--only-last")
    assert (code, err) == (
        2,
        "castalia: error: options about conversations need --chat KEY, the key of their messages\n",
    )
    code, _, err = run(*words, "--chat", "messages", "--key", "q")
    assert code == 2 and "--key names texts and --chat conversations; give one of the two" in err
    code, _, err = run(*words, "--chat", "message")
    assert code == 1
    assert (
        "c.jsonl:1: the document lacks the key 'message'; keys: messages, score; choose one" in err
    )


def test_fill_in_the_middle(run, tmp_path):
    words = ["a.jsonl", "--tokenizer", "bytes", "--output", "o", "--fim-tokens", "1,2,3"]
    assert (
        run(*words, "--fim-rate", "1", "--spm-rate", "1", "--fim-seed", "4", "--fim-epoch", "2")[0]
        == 0
    )
    assert [document[:2].tolist() for document in IndexedDataset(tmp_path / "o")[:]] == [[1, 3]] * 2
    code, _, err = run(*words)
    assert (code, err) == (
        2,
        "castalia: error: options about filling in the middle need --fim-rate SHARE\n",
    )
    code, _, err = run(*words, "--fim-rate", "1", "--chat", "text")
    assert code == 2 and "--chat and --fim-rate exclude each other" in err
