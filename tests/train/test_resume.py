"""Killed, moved to another world size, or corrupted: a run continues as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from castalia.checkpoint import read

KILL_AFTER_4 = """
import os, signal
import castalia.train.hooks as hooks
def after_step(self, step, save=hooks.Save.after_step):
    save(self, step)
    if step.number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
hooks.Save.after_step = after_step
"""
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash")


def exact(lines):
    return [{key: line[key] for key in EXACT} for line in lines]


def all_tensors(output, step):
    folder = output / "checkpoints" / f"step-{step:08d}"
    return read(folder, prefix="")


def torchrun(script, *words):
    """`castalia WORDS` on two ranks of the real launcher, which both run the script first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [sys.executable, *launcher, "--nproc-per-node=2", str(script), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Six steps without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output)
    return output


def test_killed_run_continues_bit_for_bit(train, whole, tmp_path, read_lines):
    output = tmp_path / "run"
    killed = train(output, code=KILL_AFTER_4, ok=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(read_lines(output)) == 4 and not (output / "checkpoints" / "step-00000006").exists()
    again = train(output)
    assert "resumed from" in again.stdout
    assert exact(read_lines(output)) == exact(read_lines(whole))
    ours = all_tensors(output, 6)
    theirs = all_tensors(whole, 6)
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_run_that_is_made_longer_equals_the_long_one(train, whole, tmp_path, read_lines):
    output = tmp_path / "run"
    train(output, "train.steps=3")
    train(output, "train.steps=6")
    assert exact(read_lines(output)) == exact(read_lines(whole))


@pytest.fixture(scope="module")
def killed_on_two(train, tmp_path_factory):
    """Four steps on two ranks that torchrun started, and that were killed then."""
    output = tmp_path_factory.mktemp("two") / "run"
    script = output.parent / "killed.py"
    script.write_text(f"{KILL_AFTER_4}\nfrom castalia.cli import main\nmain()\n")
    killed = torchrun(script, "train", *train.base, f"output={output}")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr
    return output


@pytest.mark.parametrize("processes", [1, 3])
def test_saved_on_two_processes_and_resumed_on_others(
    train, whole, killed_on_two, tmp_path, read_lines, processes
):
    output = tmp_path / "run"
    shutil.copytree(killed_on_two, output)
    assert len(read_lines(output)) == 4
    assert "resumed from" in train(output, processes=processes).stdout
    ours = read_lines(output)
    theirs = read_lines(whole)
    assert [line["rows_hash"] for line in ours] == [line["rows_hash"] for line in theirs]
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
    reference = all_tensors(whole, 6)
    for name, tensor in all_tensors(output, 6).items():
        difference = (tensor - reference[name]).abs()
        if name.endswith("qkv.bias"):
            # A key bias shifts all scores of a query alike: its gradient is rounding noise, which
            # Adam turns into steps of the size of lr.
            difference = difference.view(-1, 3, 8)[:, [0, 2]]
        assert difference.max() <= 1e-5, name


@pytest.mark.parametrize(
    "name", ["model-00000.safetensors", "state.json", "manifest.json", "COMPLETE"]
)
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(
    train, whole, tmp_path, read_lines, name
):
    output = tmp_path / "run"
    train(output, "train.steps=3")
    path = output / "checkpoints" / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = train(output, "train.steps=3")
    assert "step-00000002" in again.stdout and name in again.stderr
    assert [line["rows_hash"] for line in read_lines(output)] == [
        line["rows_hash"] for line in read_lines(whole)[:3]
    ]


def test_a_finished_run_says_so_and_changes_nothing(train, whole):
    before = {
        path: path.stat().st_mtime_ns
        for path in (whole / "checkpoints").rglob("*")
        if path.is_file()
    }
    done = train(whole)
    assert "done: step 6 of 6" in done.stdout
    assert before == {
        path: path.stat().st_mtime_ns
        for path in (whole / "checkpoints").rglob("*")
        if path.is_file()
    }


def test_changed_data_stop_a_resume(train, tokens, tmp_path):
    moved = tmp_path / "moved"
    for end in (".bin", ".idx"):
        (tmp_path / f"moved{end}").write_bytes(tokens.with_suffix(end).read_bytes())
    output = tmp_path / "run"
    train(output, f"data.train={moved}", "train.steps=2")
    content = bytearray((tmp_path / "moved.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "moved.bin").write_bytes(content)
    refused = train(output, f"data.train={moved}", ok=False)
    assert refused.returncode == 1
    assert "the data differ from those of the checkpoint" in refused.stderr
    assert "data.allow_changed=true" in refused.stderr and "Traceback" not in refused.stderr
    assert (
        "data.allow_changed is true"
        in train(output, f"data.train={moved}", "data.allow_changed=true").stderr
    )


def test_the_same_data_elsewhere_resume(train, tokens, tmp_path):
    output = tmp_path / "run"
    train(output, "train.steps=2")
    for end in (".bin", ".idx"):
        (tmp_path / f"copy{end}").write_bytes(tokens.with_suffix(end).read_bytes())
    assert "resumed from" in train(output, f"data.train={tmp_path / 'copy'}").stdout


def test_a_folder_with_a_run_of_another_config_is_refused(train, whole):
    before = (whole / "config.yaml").read_text()
    refused = train(whole, "optim.lr=1e-4", "model.hidden_size=64", ok=False)
    assert refused.returncode == 2
    assert "holds a run of another config" in refused.stderr
    assert (
        "optim.lr: 0.002 there, 0.0001 now" in refused.stderr
        and "model.hidden_size" in refused.stderr
    )
    assert (whole / "config.yaml").read_text() == before


def test_no_load_of_a_run_unpickles(train, whole):
    audit = """
import sys
import castalia.cli as cli
events = []
sys.addaudithook(lambda event, args: events.append(args) if event.startswith("pickle.") else None)
def audited(main=cli.main):
    try:
        main()
    finally:
        print("UNPICKLED", events)
cli.main = audited
"""
    done = train(whole, code=audit)
    assert "UNPICKLED []" in done.stdout


def test_config_of_the_run_folder_repeats_it(train, whole, tmp_path, read_lines):
    words = ["train", str(whole / "config.yaml"), f"output={tmp_path / 'again'}"]
    done = train.shell.castalia(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert exact(read_lines(tmp_path / "again")) == exact(read_lines(whole))
    assert "castalia train" in (whole / "command.txt").read_text()
    assert json.loads((whole / "env.json").read_text())["packages"]["torch"]
