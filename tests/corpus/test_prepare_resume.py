"""A job that is killed, fills the disk or meets other inputs: run again, it ends the same."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.corpus import executors, prepare, work_folder
from castalia.corpus.work_folder import WorkFolder
from castalia.data import IndexedDataset

SUFFIXES = (".bin", ".idx", ".documents.parquet")
PART = 20_000


@pytest.fixture
def corpus(tmp_path):
    """Two files, one of them compressed, of 240 documents in some twenty parts."""
    import gzip

    draw = random.Random(1)
    texts = ["".join(draw.choices("abc d\né", k=draw.randrange(1, 3000))) for _ in range(240)]
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:120]) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[120:]).encode()))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


def content(prefix):
    return [open(f"{prefix}{suffix}", "rb").read() for suffix in SUFFIXES]


@pytest.fixture
def whole(corpus, tmp_path):
    """What one undisturbed run writes."""
    prepare(corpus, tmp_path / "whole", "bytes", append_eod=True, part_bytes=PART)
    return content(tmp_path / "whole")


SCRIPT = """
import sys
from castalia.corpus import prepare
if __name__ == "__main__":
    workers = int(sys.argv[2])
    prepare(sys.argv[3:], sys.argv[1], "bytes", append_eod=True, part_bytes=20000, workers=workers)
"""


@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        (1, 3),
        (2, 3),
        pytest.param(1, 10, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_points(corpus, whole, tmp_path, workers, kills):
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        str(tmp_path / "out"),
        str(workers),
        *corpus,
    ]
    folder, draw, killed = tmp_path / "out.parts", random.Random(workers), 0
    for _ in range(kills):
        done = len(list(folder.glob("*.record.json")))
        wanted = done + draw.randrange(
            3
        )  # it dies at any moment around the end of one of the next parts
        job = subprocess.Popen(command, start_new_session=True)
        while job.poll() is None and len(list(folder.glob("*.record.json"))) <= wanted:
            time.sleep(0.001)
        time.sleep(draw.choice([0, 0.001, 0.005]))
        killed += job.poll() is None
        job.kill()
        job.wait()
    assert killed >= kills / 2
    subprocess.run(command, check=True)
    assert content(tmp_path / "out") == whole
    assert not (tmp_path / "out.parts").exists()


def test_killed_between_any_two_files(corpus, whole, tmp_path, monkeypatch):
    """Stopped at every step of the work folder in turn, down to each of the last renames."""
    real, count = os.replace, 0

    def replace(*names, **options):
        nonlocal count
        count -= 1
        if count == 0:
            raise KeyboardInterrupt
        real(*names, **options)

    monkeypatch.setattr(os, "replace", replace)
    step, finished = 0, False
    while not finished:
        step += 1 if step < 8 else 17
        count = step
        with contextlib.suppress(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART)
            finished = True
    assert step > 8
    assert content(tmp_path / "out") == whole


def test_a_damaged_work_folder_is_not_believed(stop_after, corpus, whole, tmp_path):
    """Whatever byte of it a crash of the machine lost."""
    draw = random.Random(3)
    for _ in range(4):
        stop_after(8, corpus, tmp_path / "out", append_eod=True, part_bytes=PART)
        for path in draw.sample(sorted((tmp_path / "out.parts").iterdir()), 8):
            data = bytearray(path.read_bytes())
            if path.name == "lock" or not data:
                continue
            if draw.random() < 0.5:
                data[draw.randrange(len(data))] ^= 0x55
            else:
                del data[draw.randrange(len(data)) :]
            path.write_bytes(data)
        prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART, overwrite=True)
        assert content(tmp_path / "out") == whole


def test_what_was_done_is_not_done_again(stop_after, corpus, whole, tmp_path, monkeypatch):
    stop_after(8, corpus, tmp_path / "out", append_eod=True, part_bytes=PART)
    worked = []
    real = executors.encode_part
    monkeypatch.setattr(
        executors,
        "encode_part",
        lambda job, part, by: worked.append(part.number) or real(job, part, by),
    )
    prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART)
    assert worked[0] == 8
    assert content(tmp_path / "out") == whole


def test_changed_inputs_and_settings_are_seen(stop_after, corpus, tmp_path):
    again = {"part_bytes": PART, "overwrite": True}
    stop_after(8, corpus, tmp_path / "out", append_eod=True, part_bytes=PART)
    with open(corpus[0], "a") as file:
        file.write('{"text": "one more"}\n')
    prepare(corpus, tmp_path / "out", "bytes", append_eod=True, **again)
    prepare(corpus, tmp_path / "whole", "bytes", append_eod=True, **again)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    stop_after(8, corpus, tmp_path / "out", append_eod=True, part_bytes=PART)
    prepare(corpus, tmp_path / "out", "bytes", append_eod=False, **again)
    prepare(corpus, tmp_path / "whole", "bytes", append_eod=False, **again)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_bad_line_late_keeps_what_was_done(corpus, tmp_path):
    with open(corpus[0], "a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:121: invalid JSON"):
        prepare(corpus, tmp_path / "out", "bytes", part_bytes=PART)
    assert (tmp_path / "out.parts").is_dir() and not (tmp_path / "out.bin").exists()
    done = prepare(corpus, tmp_path / "out", "bytes", part_bytes=PART, reject=True)
    assert (done.documents, done.rejected) == (240, 1)
    assert json.loads((tmp_path / "out.rejects.jsonl").read_text())["line"] == 121


def test_a_full_disk_then_room(corpus, whole, tmp_path):
    """A limit on the size of files stands for the disk; the job goes on when it is gone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole[0]) // 2, limits[1]))
    try:
        with pytest.raises(
            CastaliaError, match=r"cannot write .*out\.bin: File too large; free space or choose"
        ):
            prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out.parts").is_dir() and not (tmp_path / "out.bin").exists()
    prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART)
    assert content(tmp_path / "out") == whole


def test_two_at_once_are_refused(corpus, tmp_path):
    (tmp_path / "out.parts").mkdir()
    with open(tmp_path / "out.parts" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is writing .*out"):
            prepare(corpus, tmp_path / "out", "bytes")


def die_once(folder):
    """What a worker does instead of a part: it dies, but the second time it works."""
    from castalia.corpus import executors

    real = executors.encode_part

    def encode_part(job, part, encoder):
        mark = folder / f"died{part.number}"
        if part.number in (3, 7) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job, part, encoder)

    return encode_part


DYING = (
    """
import sys, pathlib, importlib.util
from castalia.corpus import executors
spec = importlib.util.spec_from_file_location("dying", {test!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
executors.encode_part = module.die_once(pathlib.Path({folder!r}))
"""
    + SCRIPT
)


def test_workers_that_die_are_replaced(corpus, whole, tmp_path):
    (tmp_path / "run.py").write_text(DYING.format(test=__file__, folder=str(tmp_path)))
    subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out"), "2", *corpus], check=True
    )
    assert (tmp_path / "died3").exists() and (tmp_path / "died7").exists()
    assert content(tmp_path / "out") == whole


def test_the_record_of_a_resumed_job_is_right(stop_after, corpus, tmp_path):
    stop_after(8, corpus, tmp_path / "out", append_eod=True, part_bytes=PART)
    prepare(corpus, tmp_path / "out", "bytes", append_eod=True, part_bytes=PART)
    from castalia.curate.verify import verify

    assert all(check.ok for check in verify([tmp_path / "out"]))
    assert len(IndexedDataset(tmp_path / "out")) == 240


def test_tokens_are_on_disk_once(corpus, tmp_path, monkeypatch):
    """Tokens are on disk once, but for the part being appended and those waiting for a flush."""
    most = parts = 0
    real = WorkFolder.take
    monkeypatch.setattr(work_folder, "MOST_UNFLUSHED", 2)

    def take(self, record):
        nonlocal most, parts
        most, parts = max(most, len(list(self.folder.glob("0*.0.bin")))), parts + 1
        real(self, record)

    monkeypatch.setattr(WorkFolder, "take", take)
    prepare(corpus, tmp_path / "out", "bytes", part_bytes=PART)
    assert 1 <= most <= 3 < parts


def test_what_the_disk_says_late_is_an_error_and_nothing_is_lost(corpus, tmp_path, monkeypatch):
    """fsync is where some file systems first say that there is no room."""
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CastaliaError, match="No space left on device"):
        prepare(corpus, tmp_path / "out", "bytes", part_bytes=PART)
    assert not (tmp_path / "out.bin").exists()
    prepare(corpus, tmp_path / "out", "bytes", part_bytes=PART)
    prepare(corpus, tmp_path / "whole", "bytes", part_bytes=PART)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
