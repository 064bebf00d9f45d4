"""SIGKILL of what started a run: its ranks and members are gone within seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SECONDS = 60.0
"""Time for all ranks to be gone."""
TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=4",
    "train.steps=1000000",
    "checkpoint.steps=[]",
)
LAUNCH = ("-m", "castalia", "launch", "debug", *TINY, "--procs-per-node=2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SUITE = "base: debug\nsizes: {a: {}}\nset: {%s}\n"


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start Python in a folder; its output goes to a file, which no killed process keeps open."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=log, stderr=log
        )


def trainers(starter: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    """The processes of `castalia train` below another, once there are `count`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        below = psutil.Process(starter.pid).children(recursive=True)
        found = [process for process in below if "train" in process.cmdline()]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} processes did not start")


def require_end(processes: list[psutil.Process]) -> None:
    """All of them end in time."""
    deadline = time.monotonic() + SECONDS
    while living := [process for process in processes if is_alive(process)]:
        if time.monotonic() > deadline:
            for process in living:
                process.kill()
            raise AssertionError(f"{len(living)} of {len(processes)} processes outlived their own")
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended may have nobody to collect its status."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_steps(metrics: Path) -> None:
    """Wait until a run has trained a few steps."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("words", [LAUNCH, (*TORCHRUN, "-m", "castalia", "train", "debug", *TINY)])
def test_ranks_end_with_their_launcher(tmp_path, words):
    launcher = start(tmp_path, *words, "output=waiting")
    ranks = trainers(launcher, 2)
    # From the second thread on, the watching one, it ends with its launcher.
    while min(rank.num_threads() for rank in ranks) < 2:
        time.sleep(0.05)
    # The other one waits for it in the rendezvous.
    ranks[1].suspend()
    time.sleep(10)
    launcher.kill()
    require_end(ranks)
    launcher.wait()
    assert not (tmp_path / "waiting" / "metrics.jsonl").exists()
    launcher = start(tmp_path, *words, "output=training")
    ranks = trainers(launcher, 2)
    wait_for_steps(tmp_path / "training" / "metrics.jsonl")
    launcher.kill()
    require_end(ranks)
    launcher.wait()


@pytest.mark.slow
def test_the_member_of_a_killed_suite_saves_and_ends(tmp_path):
    settings = ", ".join(word.replace("=", ": ") for word in TINY)
    (tmp_path / "one.yaml").write_text(SUITE % settings)
    suite = start(tmp_path, "-m", "castalia", "suite", "one.yaml", "--run", "output=suite")
    members = trainers(suite, 1)
    (folder,) = [words for words in members[0].cmdline() if words.startswith("output=")]
    run = tmp_path / folder.removeprefix("output=").strip('"')
    wait_for_steps(run / "metrics.jsonl")
    suite.kill()
    require_end(members)
    suite.wait()
    assert list(run.glob("checkpoints/*/COMPLETE"))
