"""Worker processes: their state, their exit with the parent, and the error if they cannot start."""

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest

from castalia.core.workers import WorkerPool, end_with_pipe

HELD = []


def hold(state):
    HELD.append(state)


def held(factor):
    return len(HELD[0]) * factor


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_worker_receives_the_state_however_large():
    with WorkerPool(2, hold, bytes(3_000_000)) as pool:
        assert list(pool.map(held, range(20))) == [3_000_000 * i for i in range(20)]
        assert pool.why_none_began is None


def test_a_state_that_cannot_be_pickled_is_an_error_at_once():
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        WorkerPool(2, hold, lambda: 0)


def test_files_are_closed_with_the_pool():
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(3):
        with WorkerPool(1, hold, bytes(100_000)) as pool:
            assert pool.submit(held, 1).result() == 100_000
        del pool
    gc.collect()
    assert opened() <= before + 1  # the tracker of semaphores stays


def test_only_the_parent_answers_a_request_to_end():
    """A scheduler sends its signals to every process of the job."""
    with WorkerPool(1, hold, b"12") as pool:
        worker = pool.submit(os.getpid).result()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker, number)
        assert pool.submit(held, 3).result() == 6
        assert pool.submit(os.getpid).result() == worker


def test_killing_a_pool_ends_its_workers_and_no_other_child():
    with subprocess.Popen(["sleep", "60"]) as other, WorkerPool(1, hold, b"12") as beside:
        own = beside.submit(os.getpid).result()
        pool = WorkerPool(1, hold, b"12")
        assert pool.submit(held, 3).result() == 6
        stuck = pool.submit(time.sleep, 60)
        pool.kill()
        with pytest.raises(BrokenProcessPool):
            stuck.result(timeout=50)
        assert other.poll() is None and beside.submit(os.getpid).result() == own
        other.kill()


def test_a_worker_that_dies_at_work_did_start():
    with WorkerPool(2, hold, b"") as pool, pytest.raises(BrokenProcessPool):
        pool.submit(die).result()
    assert pool.why_none_began is None


LOADER = """
from castalia.data import DataConfig, StepLoader, build_rows
prepare(["a.jsonl"], "a", "bytes")
config = DataConfig(seq_length=1, train=["a"])
rows = build_rows(config, seed=0, batch_size=1, steps=9, eval_every=None, eval_batches=1).train
print(next(iter(StepLoader(rows, batch_size=1, workers=2))))
"""


@pytest.mark.parametrize("room", ["prepare", "loader"])
def test_a_script_without_a_main_guard_is_an_error_at_once(tmp_path, room):
    """Each worker imports the script and starts its work again; a large state used to hang."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 50_000)
    script = "from castalia.corpus import prepare\n"
    if room == "prepare":
        script += "prepare(['a.jsonl'], 'a', 'bytes', workers=2)\n"
    else:
        script += LOADER
    (tmp_path / "job.py").write_text(script)
    job = [sys.executable, tmp_path / "job.py"]
    done = subprocess.run(
        job, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


def keep_the_lock():
    """Minutes in one call of C, which keeps Python's lock."""
    return sum(range(10**11))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not asked")
def test_a_kernel_that_does_not_watch_the_parent_is_no_error(monkeypatch):
    asked = []

    def refused(*arguments):
        asked.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fcntl.fcntl", refused)
    end_with_pipe(0)
    assert asked


@pytest.mark.parametrize("work", ["nothing", "a call that keeps Python's lock"])
def test_workers_exit_with_their_parent(tmp_path, work):
    script = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_workers import WorkerPool, held, hold, keep_the_lock
if __name__ == "__main__":
    pool = WorkerPool(2, hold, b"12")
    assert list(pool.map(held, range(4))) == [0, 2, 4, 6]
    if {work != "nothing"}:
        pool.submit(keep_the_lock)
        time.sleep(0.3)
    print("at work", flush=True)
    time.sleep(60)
"""
    (tmp_path / "job.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, tmp_path / "job.py"], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "at work\n"
        children = psutil.Process(job.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert workers
        job.kill()
    deadline = time.monotonic() + 60
    while any(
        worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
