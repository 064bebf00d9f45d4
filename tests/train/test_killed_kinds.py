"""Every kind of layer: a run that was broken off behind its last checkpoint goes on bit for bit."""

import signal

import pytest
import torch

from castalia.checkpoint import read
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.train.hooks import Hook, Save
from castalia.train.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
SHORT = (
    "model.hidden_size=32",
    "data.seq_length=16",
    "train.steps=4",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_every=null",
    "checkpoint.steps=[2]",
    "checkpoint.every=4",
)
RUNS = {
    "experts balanced by a bias": (
        "debug-llama",
        "model.num_layers=2",
        "model.moe={experts: 4, top_k: 2, expert_size: 32, bias_rate: 0.01, jitter: 0.1}",
    ),
    "experts that drop tokens": (
        "debug-llama",
        "model.num_layers=2",
        "model.moe={experts: 4, top_k: 2, expert_size: 32, capacity_factor: 0.5, min_capacity: 0}",
    ),
    "mamba": ("debug-mamba", "model.num_layers=2"),
    "mamba2": ("debug-mamba2", "model.num_layers=2", "model.mamba2={head_size: 16}"),
    "rwkv6": ("debug-rwkv6", "model.num_layers=2", "model.rwkv6={head_size: 16}"),
    "rwkv7": ("debug-rwkv", "model.num_layers=2", "model.rwkv7={head_size: 16}"),
    "gmlp": ("debug-gmlp", "model.num_layers=2"),
    "hybrid": ("debug-hybrid",),
}
"""Preset and overrides that make each kind small."""
EXACT = ("loss", "lr", "grad_norm", "tokens", "rows_hash")


class PowerCut(BaseException):
    """Ends a run as nothing in it expects."""


class Broken(Hook):
    """Collects the numbers of each step, and breaks the run off after one of them."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.lines: list[dict[str, object]] = []
        self.dropped = 0.0

    def after_step(self, step) -> None:
        # Also what the experts of the step did.
        keys = [key for key in step.metrics if key in EXACT or key.startswith("moe/")]
        self.lines.append({"step": step.number} | {key: step.metrics[key] for key in keys})
        self.dropped += step.metrics.get("moe/dropped", 0.0)
        if step.number == self.after:
            raise PowerCut


def trainer_of(kind, tokens, output, hook):
    words = [*RUNS[kind], *SHORT, f"data.train={tokens}", f"output={output}"]
    return Trainer(load_config(words), ALONE, hooks=[Save(), hook])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(kind, tokens, tmp_path):
    whole = Broken()
    trainer_of(kind, tokens, tmp_path / "whole", whole).fit()
    assert (whole.dropped > 0) == (kind == "experts that drop tokens")
    # The third step is lost: what it did to weights, moments and balance must not be seen again.
    with pytest.raises(PowerCut):
        trainer_of(kind, tokens, tmp_path / "broken", Broken(after=3)).fit()
    again = Broken()
    trainer_of(kind, tokens, tmp_path / "broken", again).fit()
    assert [line["step"] for line in again.lines] == [3, 4]
    assert all(key in line for line in again.lines for key in EXACT)
    assert ("moe/layers" in again.lines[0]) == kind.startswith("experts")
    assert again.lines == whole.lines[2:]
    require_equal(tmp_path / "broken", tmp_path / "whole", kind)


def require_equal(output, reference, kind):
    """The last checkpoints hold the same bits, those of the optimizer included."""
    folder = "checkpoints/step-00000004"
    ours = read(output / folder, prefix="")
    theirs = read(reference / folder, prefix="")
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    if kind == "experts balanced by a bias":
        # It moved, so that losing it would be seen.
        assert any(name.endswith("router.bias") and ours[name].any() for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_process_goes_on_bit_for_bit(kind, tokens, train, tmp_path):
    complete = tmp_path / "killed/checkpoints/step-00000002/COMPLETE"
    code = f"""
import os, pathlib, signal, time
import castalia.train.hooks as hooks
def after_step(self, step, save=hooks.Save.after_step):
    save(self, step)
    if step.number == 3:
        # Checkpoints are written in the background.
        while not pathlib.Path({str(complete)!r}).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
hooks.Save.after_step = after_step
"""
    words = ["train", *RUNS[kind], *SHORT, f"data.train={tokens}"]
    shell = train.shell
    whole = shell.castalia([*words, f"output={tmp_path / 'whole'}"])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    killed = shell.castalia([*words, f"output={tmp_path / 'killed'}"], code=code)
    assert killed.returncode == -signal.SIGKILL
    again = shell.castalia([*words, f"output={tmp_path / 'killed'}"])
    assert "resumed from" in again.stdout, again.stdout + again.stderr
    require_equal(tmp_path / "killed", tmp_path / "whole", kind)
