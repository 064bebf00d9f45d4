"""Names of hosts, paths and values that a shell or ssh would take for something else; credentials
that would leave this host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.core.errors import ConfigError
from castalia.launch.commands import mpi, pdsh
from castalia.launch.config import LaunchConfig
from castalia.launch.hostfile import choose, read_hostfile
from castalia.launch.plan import LaunchPlan, passed_variables
from castalia.launch.slurm import sbatch_script
from castalia.launch.starting import ssh_failure, submit

NASTY = 'it\'s $(touch planted); `touch planted` "50%n"'
SHOW = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done
printf 'A=%s\\n' "$A"
"""


@pytest.fixture
def show(tmp_path, monkeypatch) -> Path:
    """A program that prints its words and the variable A, a line each; the interpreter of plans."""
    path = tmp_path / "bin" / "show"
    path.parent.mkdir()
    path.write_text(SHOW)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    for name in ("ssh", "srun", "sbatch"):
        (path.parent / name).symlink_to(path)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    folder = tmp_path / NASTY
    folder.mkdir()
    monkeypatch.chdir(folder)
    return path


def plan_for(launcher: str, hosts: dict[str, list[int]], **options: object) -> LaunchPlan:
    """A plan whose words, folder and variable are nasty."""
    config = LaunchConfig(launcher=launcher, environment={"A": NASTY}, **options)
    command = ["-m", "castalia", "train", f"output={NASTY}"]
    return LaunchPlan(config, hosts, command, Path.cwd() / "run", 10)


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}planted slots=1",
        "-l slots=1",
        "me@-oProxyCommand=x slots=1",
        "-host:2",
        "a;b slots=1",
        "$(b) slots=1",
        "a`b` slots=1",
        "a'b",
    ],
)
def test_hosts_that_are_options_or_commands_are_refused(line, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(f"fine slots=1\n{line}\n")
    with pytest.raises(ConfigError, match=f"hostfile {path} line 2: .*expected `host slots=N`"):
        read_hostfile(path)
    word = line.partition(" ")[0]
    with pytest.raises(ConfigError, match=r"include .*(expected host or host:0|unknown host)"):
        choose({"fine": [0]}, include=word)
    with pytest.raises(ValueError, match="neither the name nor the address of a host"):
        LaunchConfig(master_addr=word)


def test_addresses_of_masters():
    for host in ("node-1", "10.0.0.1", "::1", "[::1]", "fe80::1%eth0", "_x.local"):
        assert LaunchConfig(master_addr=host).master_addr == host


def test_ssh_takes_no_host_for_an_option(show):
    show.write_text('#!/bin/sh\necho "$@" >&2; exit 1\n')
    assert ssh_failure("node-1").endswith("ConnectTimeout=10 -- node-1 true")


def test_words_and_paths_arrive_as_they_are(show, tmp_path):
    plan = plan_for("pdsh", {"a": [0], "b": [0]})
    remote = pdsh(plan)[-1]
    # pdsh replaces %n by the number of the host, and %% by %.
    remote = remote.replace("%%", "\0").replace("%n", "1").replace("\0", "%")
    lines = subprocess.run(["sh", "-c", remote], capture_output=True, text=True, check=True).stdout
    assert lines.splitlines()[-5:] == [*plan.command, f"A={NASTY}"]
    plan = plan_for("slurm", {"(0)": [0]})
    script = sbatch_script(plan)
    lines = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert lines.splitlines()[1:] == [sys.executable, *plan.command, f"A={NASTY}"]
    assert not list(tmp_path.rglob("planted"))
    for slurm in ({"time=1 --wrap": "x"}, {"comment": "a\nb"}):
        with pytest.raises(ConfigError, match=r"launch\.slurm"):
            sbatch_script(plan_for("slurm", {"(0)": [0]}, slurm=slurm))
    with pytest.raises(ConfigError, match="single line"):
        sbatch_script(plan._replace(output=tmp_path / "a\ntouch planted"))


def test_credentials_stay_on_this_host(show, monkeypatch, capsys):
    for name in ("CASTALIA_API_KEY", "NCCL_SECRET", "TORCH_TOKEN", "WANDB_API_KEY", "NCCL_IB_PKEY"):
        monkeypatch.setenv(name, "x5")
    monkeypatch.setenv("NCCL_A;touch planted", "1")
    monkeypatch.setenv("CASTALIA_PROXY", "https://me:x5@h/")
    forwarded = passed_variables(LaunchConfig())
    assert [name for name, value in forwarded.items() if "x5" in value] == ["NCCL_IB_PKEY"]
    assert all(name.isidentifier() for name in forwarded)
    monkeypatch.delenv("NCCL_IB_PKEY")
    hosts = {"a": [0], "b": [0]}
    for command in (pdsh(plan_for("pdsh", hosts)), mpi(plan_for("mpi", hosts))):
        assert "x5" not in " ".join(command)
    # sbatch would send the whole environment.
    show.write_text("#!/bin/sh\nenv\n")
    assert submit(plan_for("slurm", {"(0)": [0]}), ["sbatch"]) == 0
    said = capsys.readouterr()
    assert "x5" not in said.out and "PATH=" in said.out
    assert "WANDB_API_KEY stay on this host: credentials are not sent" in said.err
