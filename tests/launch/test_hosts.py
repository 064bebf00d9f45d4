"""Real launchers on this machine: Open MPI, pdsh over ssh, and two hosts in network namespaces."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASE = (
    "debug",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.batch_size=12",
)
SHORT = (*BASE, "train.steps=3", "checkpoint.steps=[]")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def needs(**packages: str) -> pytest.MarkDecorator:
    """Skip with the missing Debian packages unless every program is installed: program=package."""
    missing = sorted(
        package for program, package in packages.items() if not shutil.which(program, path=PATH)
    )
    return pytest.mark.skipif(bool(missing), reason=f"apt-get install {' '.join(missing)}")


def castalia(
    *words: str, folder: Path, inside: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """Start a castalia command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": PATH} | variables
    command = [*inside, sys.executable, "-m", "castalia", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """Output of a command that must succeed."""
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    return out


def losses(run: Path) -> list[float]:
    """Loss of each step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of the short run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    ended(castalia("train", *SHORT, "output=run", folder=folder))
    return losses(folder / "run")


def free_port() -> int:
    """A free port."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


@pytest.mark.slow
@needs(mpirun="openmpi-bin")
def test_mpirun_starts_four_processes(alone, tmp_path):
    words = (
        "launch",
        *SHORT,
        "output=run",
        "--launcher=mpi",
        "--procs-per-node=4",
        f"--master-port={free_port()}",
    )
    said = ended(
        castalia(
            *words, folder=tmp_path, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1"
        )
    )
    assert "4 on cpu" in said
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@needs(mpirun="openmpi-bin")
def test_plain_mpirun_is_recognised_without_castalia_launch(alone, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [
        "mpirun",
        "--allow-run-as-root",
        "-np",
        "2",
        "--oversubscribe",
        sys.executable,
        "-m",
        "castalia",
    ]
    command += ["train", *SHORT, "output=run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@needs(mpirun="openmpi-bin")
def test_stopping_mpirun_saves_and_the_same_command_resumes(tmp_path):
    words = (
        "launch",
        *BASE,
        "train.steps=400",
        "checkpoint.steps=[]",
        "output=run",
        "--launcher=mpi",
    )
    words += (
        "--procs-per-node=2",
        "--launcher-args=--allow-run-as-root",
        f"--master-port={free_port()}",
    )
    running = castalia(*words, folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and (
        not metrics.exists() or len(metrics.read_text().splitlines()) < 5
    ):
        time.sleep(0.2)
    running.terminate()
    assert "stopped at step" in ended(running)
    said = ended(castalia(*words, folder=tmp_path))
    assert "resumed from" in said and "done: step 400 of 400" in said
    assert len(losses(tmp_path / "run")) == 400


@pytest.fixture(scope="module")
def ssh_server(tmp_path_factory):
    """A private ssh server that accepts this user's key; gives the ssh arguments that reach it."""
    folder = tmp_path_factory.mktemp("ssh")
    port = free_port()
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    shutil.copy(folder / "user.pub", folder / "allowed")
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "StrictModes": "no",
    }
    options |= {
        "AuthorizedKeysFile": folder / "allowed",
        "PidFile": folder / "pid",
        "PermitRootLogin": "yes",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(
        [shutil.which("sshd", path=PATH), "-D", "-e", "-f", folder / "config"]
    )
    known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    time.sleep(1)
    yield f"-p {port} -i {folder / 'user'} {known}"
    server.terminate()
    server.wait(timeout=120)


@pytest.mark.slow
@needs(pdsh="pdsh", sshd="openssh-server", ssh="openssh-client")
def test_pdsh_starts_one_torchrun_on_each_host(alone, ssh_server, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nlocalhost slots=1\n")
    words = (
        "launch",
        *SHORT,
        "output=run",
        "--launcher=pdsh",
        "--hostfile=hosts",
        f"--master-port={free_port()}",
    )
    said = ended(castalia(*words, folder=tmp_path, PDSH_SSH_ARGS_APPEND=ssh_server))
    assert "3 on cpu" in said
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@needs(pdsh="pdsh", sshd="openssh-server", ssh="openssh-client")
def test_a_failure_on_a_host_is_a_failure_of_pdsh(ssh_server, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    words = (
        "launch",
        *SHORT,
        "train.batch_size=3",
        "output=run",
        "--launcher=pdsh",
        "--hostfile=hosts",
    )
    running = castalia(
        *words, f"--master-port={free_port()}", folder=tmp_path, PDSH_SSH_ARGS_APPEND=ssh_server
    )
    out, err = running.communicate(timeout=180)
    assert running.returncode != 0
    assert "castalia: error: " in out + err


@pytest.mark.slow
@needs(pdsh="pdsh", ssh="openssh-client")
def test_a_host_that_does_not_answer_is_named(tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nno-such-host.invalid slots=1\n")
    words = ("launch", *SHORT, "output=run", "--launcher=pdsh", "--hostfile=hosts")
    running = castalia(*words, folder=tmp_path, PDSH_SSH_ARGS_APPEND=f"-p {free_port()}")
    _, err = running.communicate(timeout=200)
    assert running.returncode == 2
    assert err.startswith(
        "castalia: error: ssh does not reach 2 of 2 hosts: 127.0.0.1 (ssh: connect to host "
    )
    assert (
        "Connection refused" in err
        and "no-such-host.invalid (ssh: Could not resolve hostname" in err
    )
    assert err.count("\n") == 1


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable; gives (name, address, interface) of each."""
    hosts = [(f"castalia{n}", f"10.213.77.{n + 1}", f"cast{n}") for n in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(
            ["ip", *words], check=True, capture_output=True, env=os.environ | {"PATH": PATH}
        )

    try:
        for name, _, _ in hosts:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            hosts[0][2],
            "netns",
            hosts[0][0],
            "type",
            "veth",
            "peer",
            hosts[1][2],
            "netns",
            hosts[1][0],
        )
        for name, address, interface in hosts:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    yield hosts
    for name, _, _ in hosts:
        ip("netns", "del", name)


@pytest.mark.slow
@needs(ip="iproute2")
def test_torchrun_meets_across_two_hosts(alone, two_hosts, tmp_path):
    running = []
    for number, (name, address, interface) in enumerate(two_hosts):
        words = (
            "launch",
            *SHORT,
            "output=run",
            "--nodes=2",
            "--procs-per-node=1",
            f"--node-rank={number}",
        )
        words += (f"--master-addr={two_hosts[0][1]}", f"--launcher-args=--local-addr={address}")
        words += (f"--env=GLOO_SOCKET_IFNAME={interface}",)
        running.append(castalia(*words, folder=tmp_path, inside=("ip", "netns", "exec", name)))
    said = "".join(ended(process) for process in running)
    assert "2 on cpu" in said
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)


def test_ctrl_c_reaches_the_ranks_of_mpirun_as_a_request_to_save(tmp_path):
    """A shell in place of mpirun, which kills its ranks on a signal of the terminal's."""
    stand_in = f"trap 'touch {tmp_path}/saved; exit 0' USR1; echo up; while :; do sleep 0.05; done"
    code = (
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " from castalia.launch.starting import run_mpi;"
        f" sys.exit(run_mpi(['sh', '-c', {stand_in!r}], 0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        assert job.stdout.readline() == "up\n"
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=200) == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="no other system signals an orphan")
def test_mpirun_is_told_to_end_its_ranks_when_the_launch_is_killed(tmp_path):
    stand_in = "trap 'echo ending; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    code = (
        "import sys; from castalia.launch.starting import run_mpi;"
        f" sys.exit(run_mpi(['sh', '-c', {stand_in!r}], 0))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "up\n"
        job.kill()
        assert job.stdout.read() == "ending\n"
