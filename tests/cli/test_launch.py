"""`castalia launch`: what it would run, and one sentence for what cannot run."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest
import yaml

from castalia.cli import main

RUN = ("debug", "output=runs/first", "train.steps=30")


class Done(NamedTuple):
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Callable: run the command here in an empty folder; none of these starts a launcher."""

    def run(*words, config=RUN, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["castalia", "launch", *config, *words])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Done(end.value.code or 0, said.out, said.err)

    for name in ("DLTS_HOSTFILE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("host1 slots=4\nhost2 slots=2\n")
    return run


def planned(done):
    """Output of a dry run that must succeed, with the interpreter's path cut out."""
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(sys.executable, "python")


def failed(done):
    """The one line on stderr of a command that must fail."""
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.strip()
    assert line.startswith("castalia: error: ") and "\n" not in line, line
    return line


def test_a_key_is_neither_printed_nor_passed(launch):
    said = failed(launch("--procs-per-node=2", "--env=WANDB_API_KEY=k9", "--dry-run"))
    assert "launch.environment.WANDB_API_KEY: a config must not hold keys" in said
    assert "k9" not in said
    words = ("--launcher=pdsh", "--hostfile=hosts", "--dry-run")
    shown = planned(launch(*words, CASTALIA_API_KEY="k9", NCCL_DEBUG="INFO"))
    assert "NCCL_DEBUG=INFO" in shown and "CASTALIA_API_KEY" not in shown and "k9" not in shown


def test_torchrun_on_one_machine(launch):
    assert planned(
        launch("--procs-per-node=2", "--max-restarts=3", "--env=A=b c", "--dry-run")
    ).strip() == (
        "A='b c' python -m torch.distributed.run --max-restarts=3 --standalone"
        " --local-addr=127.0.0.1"
        " --nproc-per-node=2 -m castalia train debug output=runs/first train.steps=30"
    )


def test_torchrun_on_chosen_gpus_of_this_machine(launch, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = planned(launch("--include=localhost:4,5", "--dry-run"))
    assert said.startswith("CUDA_VISIBLE_DEVICES=4,5 python ") and "--nproc-per-node=2" in said
    said = planned(launch("--include=localhost:0", "--dry-run"))
    assert said.startswith("python ") and "--nproc-per-node=1" in said
    # Slots count within what is visible.
    visible = {"CUDA_VISIBLE_DEVICES": "3,6"}
    assert planned(launch("--include=localhost:1", "--dry-run", **visible)).startswith(
        "CUDA_VISIBLE_DEVICES=6 python "
    )


def test_torchrun_on_two_machines(launch):
    said = planned(
        launch(
            "--nodes=2", "--gpus-per-node=8", "--master-addr=host1", "--node-rank=1", "--dry-run"
        )
    )
    assert (
        "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host1:29500 --rdzv-id=first"
        " --nproc-per-node=8" in said
    )
    assert "--rdzv-conf=is_host=0" in said
    assert "name it with --master-addr" in failed(launch("--nodes=2", "--dry-run"))
    assert "--rdzv-endpoint=[fd00::1]:29500" in planned(
        launch("--nodes=2", "--master-addr=fd00::1", "--dry-run")
    )


def test_slurm_writes_a_job_that_requeues_itself(launch, tmp_path):
    said = planned(
        launch(
            *(
                "--launcher=slurm",
                "--nodes=2",
                "--gpus-per-node=4",
                "--max-restarts=1",
                "--master-port=1234",
            ),
            *("--slurm=time=04:00:00", "--slurm=account=a", "--slurm=exclusive=true", "--dry-run"),
        )
    )
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=04:00:00",
        "#SBATCH --account=a",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@120",
        "export MASTER_PORT=1234",
        f"last={tmp_path}/runs/first/checkpoints/step-00000030/COMPLETE",
        "for attempt in 0 1; do",
        f"sbatch {tmp_path}/runs/first/launch.sbatch",
    ):
        assert line in said.splitlines(), said
    assert not (tmp_path / "runs").exists()
    once = planned(launch("--launcher=slurm", "--slurm=requeue=false", "--dry-run"))
    assert "requeue" not in once and "submit it again" in once


@pytest.mark.parametrize(("saves", "again"), [(True, True), (False, False)])
def test_slurm_requeues_only_a_run_that_got_further(launch, tmp_path, saves, again):
    """A run with exhausted sources ends well before its last step, at every start."""
    run, tools = tmp_path / "runs" / "first", tmp_path / "tools"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "COMPLETE").touch()
    tools.mkdir()
    further = run / "checkpoints" / "step-00000020"
    (tools / "srun").write_text(
        f"#!/bin/sh\nmkdir {further} && touch {further}/COMPLETE\n" if saves else "#!/bin/sh\n"
    )
    (tools / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/requeued\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    said = planned(launch("--launcher=slurm", "--dry-run"))
    script = said[said.index("#!/bin/bash") : said.index("\nsbatch ")]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    assert (tmp_path / "requeued").exists() == again


def test_what_a_shell_would_not_take(launch, tmp_path):
    done = launch("--launcher-args='abc", "--dry-run")
    assert (
        done.returncode == 2
        and 'launch.launcher_args: "\'abc" is not valid shell syntax' in done.stderr
    )
    (tmp_path / "bad.yaml").write_text(
        yaml.safe_dump({"recipe": "debug", "launch": {"environment": {"A;B": "1"}}})
    )
    done = launch("--dry-run", config=("bad.yaml",))
    assert done.returncode == 2 and "'A;B' is not a variable name" in done.stderr


def test_mpi(launch):
    said = planned(
        launch(
            "--launcher=mpi", "--hostfile=hosts", "--launcher-args=--oversubscribe -v", "--dry-run"
        )
    )
    assert said.startswith("mpirun -np 6 --host host1:4,host2:2 ")
    assert "-x MASTER_ADDR=host1 -x MASTER_PORT=29500" in said
    assert said.strip().endswith(
        "--oversubscribe -v python -m castalia train debug output=runs/first train.steps=30"
    )
    picked = launch("--launcher=mpi", "--hostfile=hosts", "--include=host1:1", "--dry-run")
    assert "always uses the first slots of a host" in failed(picked)


def test_pdsh_tells_each_host_its_gpus(launch):
    said = planned(
        launch("--launcher=pdsh", "--hostfile=hosts", "--include=host1:1,3@host2:0", "--dry-run")
    )
    assert said.startswith("pdsh -S -b -R ssh -f 2 -w host1,host2 ")
    assert (
        "0) procs=2; export CUDA_VISIBLE_DEVICES=1,3;; 1) procs=1; export CUDA_VISIBLE_DEVICES=0;;"
        in said
    )
    assert "--nproc-per-node=$procs --rdzv-conf=is_host=$((%n == 0)) -m castalia train" in said
    assert " -w host2 " in planned(
        launch("--launcher=pdsh", "--exclude=host1", "--dry-run", DLTS_HOSTFILE="hosts")
    )


def test_hosts_with_users_and_addresses(launch, tmp_path):
    (tmp_path / "hosts").write_text("alice@host1 slots=2\nfd00::1 slots=2\n")
    said = planned(launch("--launcher=pdsh", "--hostfile=hosts", "--dry-run"))
    assert " -w alice@host1,fd00::1 " in said and "--rdzv-endpoint=host1:29500" in said
    said = planned(launch("--launcher=slurm", "--hostfile=hosts", "--dry-run"))
    assert "#SBATCH --nodelist=host1,fd00::1" in said
    line = failed(launch("--launcher=mpi", "--hostfile=hosts", "--dry-run"))
    assert "host alice@host1: mpirun takes no user; write `User alice`" in line
    line = failed(launch("--launcher=mpi", "--hostfile=hosts", "--exclude=host1", "--dry-run"))
    assert "host fd00::1: mpirun takes no IPv6 address" in line


def test_the_layout_is_checked_before_anything_starts(launch):
    line = failed(launch("parallel.dp_replicate=2", "--procs-per-node=3", "--dry-run"))
    assert (
        "parallel.dp_replicate=2" in line
        and "needs a world size of 2 or a multiple of it, got 3" in line
    )


def test_hostfile_with_nonsense(launch, tmp_path):
    (tmp_path / "bad").write_text("host1 slots=4\nhost2: 8 GPUs\n")
    line = failed(launch("--launcher=pdsh", "--hostfile=bad"))
    assert (
        line == "castalia: error: hostfile bad line 2: expected `host slots=N`, got 'host2: 8 GPUs'"
    )


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("slurm", "sbatch is not on the PATH; it belongs to Slurm: apt-get install slurm-client"),
        ("mpi", "mpirun is not on the PATH; it belongs to Open MPI: apt-get install openmpi-bin"),
        ("pdsh", "pdsh is not on the PATH; it belongs to pdsh: apt-get install pdsh"),
    ],
)
def test_missing_scheduler(launch, launcher, message):
    assert message in failed(
        launch(f"--launcher={launcher}", "--hostfile=hosts", "--procs-per-node=2", PATH="/nowhere")
    )


def test_a_master_without_an_address(launch):
    line = failed(launch("--nodes=2", "--master-addr=no-such-host.invalid"))
    assert "master_addr 'no-such-host.invalid' does not resolve to an address" in line


def test_a_port_in_use(launch):
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        here.listen()
        port = here.getsockname()[1]
        line = failed(launch("--nodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"))
    assert line.endswith(f"port {port} of 127.0.0.1 is in use; choose another with --master-port")


def test_options_of_gpt_neox_are_defaults(launch, tmp_path):
    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    values = shape | {
        "seq_length": 64,
        "train_batch_size": 12,
        "train_iters": 9,
        "pos_emb": "rotary",
    }
    values |= {
        "launcher": "pdsh",
        "hostfile": "hosts",
        "include": "host1",
        "num_gpus": 2,
        "master_port": 7000,
    }
    values |= {"num_nodes": -1, "no_ssh_check": True, "detect_nvlink_pairs": True, "account": "a"}
    (tmp_path / "neox.yml").write_text(yaml.safe_dump(values))
    said = planned(launch("--dry-run", config=("neox.yml",)))
    assert (
        said.startswith("pdsh ")
        and "--rdzv-endpoint=host1:7000" in said
        and "--nproc-per-node=2" in said
    )
    values |= {"deepspeed_slurm": True, "comment": "c"}
    (tmp_path / "neox.yml").write_text(yaml.safe_dump(values))
    said = planned(launch("--dry-run", config=("neox.yml",)))
    assert (
        "#SBATCH --account=a" in said
        and "#SBATCH --comment=c" in said
        and "#SBATCH --nodelist=host1" in said
    )
    assert planned(launch("--dry-run", "--launcher=mpi", config=("neox.yml",))).startswith(
        "mpirun -np 2 "
    )


def test_a_hostfile_of_gpt_neox_that_is_not_there_means_this_machine(launch, tmp_path):
    """GPT-NeoX's first example names /mock_path."""
    values = {"hostfile": "/mock_path", "include": "localhost:0", "launcher": "pdsh"}
    (tmp_path / "mock.yml").write_text(yaml.safe_dump(values))
    done = launch("--dry-run", config=("debug", "mock.yml"))
    assert "--standalone" in planned(done) and "--nproc-per-node=1" in done.stdout
    assert "note: hostfile /mock_path does not exist: the ranks start on this" in done.stderr
    assert "note: launcher pdsh has no hostfile" in done.stderr
    typed = launch("--hostfile=/mock_path", "--dry-run", config=("debug", "mock.yml"))
    assert "hostfile /mock_path cannot be read: No such file or directory" in failed(typed)
    pdsh = launch("--launcher=pdsh", "--dry-run", config=("debug",))
    assert "launcher pdsh needs a hostfile" in failed(pdsh)


def test_a_folder_of_configs(launch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("recipe: debug\n")
    done = launch("--dry-run", "-d", "configs", config=("mine", "output=runs/first"))
    assert "castalia train configs/mine.yaml output=runs/first" in planned(done)
