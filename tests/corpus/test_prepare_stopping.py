"""A job that is stopped by a signal, and continued: a sentence, its parts, not its own files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from castalia.core.errors import ConfigError, DataError
from castalia.corpus import open_files, prepare, work_folder
from castalia.corpus.inputs import list_files
from castalia.data import IndexedDataset

SUFFIXES = (".bin", ".idx", ".documents.parquet")
PART = 2000


@pytest.fixture
def corpus(tmp_path):
    """A folder with a file of some thirty parts."""
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": f"document {i} " + "x" * (i % 97)}) for i in range(800)]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "in"


def content(prefix):
    return [open(f"{prefix}{suffix}", "rb").read() for suffix in SUFFIXES]


def records(output):
    return len(list(output.with_name(output.name + ".parts").glob("*.record.json")))


def test_a_resumed_job_that_fails_at_once_keeps_what_was_done(stop_after, corpus, tmp_path):
    stop_after(8, [corpus], tmp_path / "out", part_bytes=PART)
    assert records(tmp_path / "out") == 8
    with pytest.raises(ConfigError, match="unknown --engine 'spark'"):
        prepare([corpus], tmp_path / "out", "bytes", part_bytes=PART, engine="spark")
    assert records(tmp_path / "out") == 8
    with pytest.raises(DataError, match="lacks the key 'txt'"):
        prepare([corpus], tmp_path / "new", "bytes", keys=("txt",))
    assert not (tmp_path / "new.parts").exists()


def test_an_output_among_the_inputs_does_not_read_its_own_work(stop_after, corpus, tmp_path):
    prepare([corpus], tmp_path / "whole", "bytes", part_bytes=PART)
    stop_after(8, [corpus], corpus / "out", part_bytes=PART)
    (corpus / "current_chunk_incomplete").write_bytes(b"\x28\xb5\x2f\xfd")
    assert [file.path for file in list_files([corpus])] == [str(corpus / "a.jsonl")]
    assert [file.path for file in list_files([str(corpus / "**")])] == [str(corpus / "a.jsonl")]
    prepare([corpus], corpus / "out", "bytes", part_bytes=PART)
    assert content(corpus / "out") == content(tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"out\.bin would be overwritten by the output"):
        prepare([corpus], corpus / "out", "bytes")


def test_an_empty_file_is_told_of_before_the_work(corpus, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr(work_folder.WorkFolder, "take", None)
    with pytest.raises(DataError, match=r"empty\.txt: is empty"):
        prepare([corpus, tmp_path / "empty.txt"], tmp_path / "out", "bytes")


def test_a_named_file_without_text_does_not_cost_the_work(corpus, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"blank\.jsonl: holds no text"):
        prepare([corpus, tmp_path / "blank.jsonl"], tmp_path / "out", "bytes", part_bytes=PART)
    assert records(tmp_path / "out") > 20


def test_what_cannot_be_read_twice_is_refused(corpus, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(
            DataError, match="is a pipe or a device, which cannot be read twice; write it to a file"
        ):
            prepare([path], tmp_path / "out", "bytes")
    with pytest.raises(
        DataError, match=r"names a folder, expected a prefix of files, such as .*/data/corpus"
    ):
        prepare([corpus], f"{tmp_path}/data/", "bytes")


def test_a_folder_that_was_removed_while_its_lock_was_taken(tmp_path, monkeypatch):
    """Another job ends between our opening of the lock and our holding it."""
    real, turns = open_files.fcntl.flock, []

    def flock(file, how):
        real(file, how)
        turns.append(file)
        if len(turns) == 1:
            os.remove(tmp_path / "out.parts" / "lock")

    monkeypatch.setattr(open_files.fcntl, "flock", flock)
    lock = open_files.locked(tmp_path / "out.parts")
    assert len(turns) == 2 and open_files.is_file_at(lock, tmp_path / "out.parts" / "lock")
    with pytest.raises(BlockingIOError):
        open_files.locked(tmp_path / "out.parts")


SLOW = """
import sys, time
from castalia.corpus import executors
real = executors.encode_part
parts = []
def encode_part(job, part, encoder):
    parts.append(part)
    # The job is not done when the signal comes, however late that is.
    time.sleep(0.02 if len(parts) < 6 else 1)
    return real(job, part, encoder)
executors.encode_part = encode_part
if __name__ == "__main__":
    from castalia.corpus.options import PrepareOptions
    init = PrepareOptions.__init__
    init.__defaults__ = tuple(2000 if value == 1 << 25 else value for value in init.__defaults__)
    from castalia.cli import main
    sys.argv = ["castalia", "prepare", *sys.argv[1:]]
    main()
"""


def hear_signals():
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_job_in_order_with_a_sentence(corpus, tmp_path, name, workers):
    (tmp_path / "run.py").write_text(SLOW)
    words = [
        corpus,
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "out",
        "--workers",
        str(workers),
    ]
    command = [sys.executable, tmp_path / "run.py", *words]
    # A background shell ignores SIGINT, nohup SIGHUP, and children inherit that.
    job = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_signals
    )
    deadline = time.monotonic() + 200
    while records(tmp_path / "out") < 4 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    number = getattr(signal, name)
    os.killpg(job.pid, number) if name == "SIGINT" else os.kill(job.pid, number)
    _, err = job.communicate(timeout=200)
    assert err == f"castalia: error: stopped by {name}; the same command continues\n"
    assert job.returncode == 128 + number
    assert records(tmp_path / "out") >= 4
    prepare([corpus], tmp_path / "out", "bytes", part_bytes=PART)
    assert len(IndexedDataset(tmp_path / "out")) == 800
