"""A real one-node Slurm: a stopped run requeues itself and ends as if it had not been stopped."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
SEARCHED = f"{os.environ['PATH']}:/usr/sbin"
MISSING = sorted({PACKAGES[name] for name in PACKAGES if not shutil.which(name, path=SEARCHED)})
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"apt-get install {' '.join(MISSING)}"),
    pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="slurmd needs root"),
]
CONFIG = """\
ClusterName=castalia
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobRequeue=1
KillWait=5
NodeName={name} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    """A free port."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def wait_for(true, what: str, seconds: float = 90):
    """Poll until `true()` is truthy, and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := true():
            return value
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A private munged, slurmctld and slurmd; gives the environment that reaches them."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    name = socket.gethostname().split(".")[0]
    values = {"name": name, "folder": folder, "controller": free_port(), "daemon": free_port()}
    (folder / "slurm.conf").write_text(CONFIG.format(**values))
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c", "-N", name],
    )
    daemons = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "wb")  # noqa: SIM115
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)

        def idle() -> bool:
            said = subprocess.run(
                ["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True
            )
            return said.stdout.strip() == "idle"

        wait_for(idle, f"the node is idle; see {folder}", 30)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=120)


BASE = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
)


def castalia(*words: str, folder: Path, environment: dict[str, str]) -> str:
    """Output of a castalia command that must succeed."""
    command = [sys.executable, "-m", "castalia", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(run: Path) -> list[dict]:
    """Steps in metrics.jsonl; none yet is an empty list."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may still be growing.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_a_stopped_run_is_requeued_and_resumes(slurm, tmp_path):
    run = tmp_path / "run"
    config = (*BASE, "train.steps=400", "train.log_every=100", "checkpoint.steps=[]")
    said = castalia(
        *("launch", *config, f"output={run}", "--launcher=slurm", "--procs-per-node=2"),
        *("--slurm=time=00:10:00", "--slurm=partition=main", "--env=OMP_NUM_THREADS=1"),
        folder=tmp_path,
        environment=slurm,
    )
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    wait_for(lambda: len(lines(run)) > 5, f"the first steps; {list(run.glob('slurm*'))}")
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)
    log = run / f"slurm-{job}.log"
    wait_for(lambda: "stopped at step" in log.read_text(), "the run saves and stops")

    def state() -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True
        ).stdout
        match = re.search(r"JobState=(\w+).*Restarts=(\d+)", shown, re.DOTALL)
        return f"{match[1]} {match[2]}" if match else shown

    wait_for(
        lambda: state() == "COMPLETED 1",
        f"the job ends after one restart: {state()}\n{log.read_text()}",
        180,
    )
    text = log.read_text()
    stopped = int(re.search(r"stopped at step (\d+) of 400", text)[1])
    assert f"resumed from {run}/checkpoints/step-{stopped:08d}" in text
    assert "done: step 400 of 400" in text
    assert [line["step"] for line in lines(run)] == list(range(1, 401))
    whole = tmp_path / "whole"
    castalia(
        "launch",
        *config,
        f"output={whole}",
        "--procs-per-node=2",
        folder=tmp_path,
        environment=slurm,
    )
    assert [(x["loss"], x["rows_hash"]) for x in lines(run)] == [
        (x["loss"], x["rows_hash"]) for x in lines(whole)
    ]


def test_a_job_that_slurm_refuses_is_one_sentence(slurm, tmp_path):
    command = [
        sys.executable,
        "-m",
        "castalia",
        "launch",
        *BASE,
        f"output={tmp_path}/run",
        "--launcher=slurm",
    ]
    command += ["--procs-per-node=2", "--slurm=partition=gone"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert (
        done.stderr.startswith("castalia: error: sbatch refused ")
        and "invalid partition" in done.stderr
    )
