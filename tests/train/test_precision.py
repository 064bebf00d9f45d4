"""Precision of parameters and gradients in whole runs: layouts, resumes, checkpoints."""

import pytest
import torch

from castalia.checkpoint.manifest import read_manifest
from castalia.checkpoint.tensors import checkpoint_tensors
from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.formats.saved_model import open_model
from castalia.recipes import load_config
from castalia.train.hooks import Metrics, Save
from castalia.train.trainer import Trainer

KINDS = {
    "masters": ("train.parameters=bf16",),
    "rounded": ("train.parameters=bf16_stochastic", "train.gradients=bf16"),
}
# Micro-batches, so that gradients add up before they are summed over ranks.
CUT = ("precision=bf16", "train.micro_batch_size=3")


def state_at(folder, step):
    """All tensors of a checkpoint, of the model and the optimizer."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    return dict(checkpoint_tensors(place, read_manifest(place), prefix=""))


@pytest.fixture(scope="module")
def runs(train, read_lines, tmp_path_factory):
    """Losses and folder of each run by its name: bf16 autocast; the kinds on one rank, stopped
    after three steps and resumed, and begun on two ranks."""
    root = tmp_path_factory.mktemp("precision")
    alone = World(0, 1, torch.device("cpu"))

    def run(name, *overrides):
        config = load_config([*train.base, f"output={root / name}", *CUT, *overrides])
        Trainer(config, alone, hooks=[Metrics(), Save()]).fit()
        return [line["loss"] for line in read_lines(root / name)], root / name

    out = {"autocast": run("autocast")}
    for kind, overrides in KINDS.items():
        out[kind] = run(kind, *overrides)
        run(f"{kind} resumed", *overrides, "train.exit_every=3")
        out[f"{kind} resumed"] = run(f"{kind} resumed", *overrides)
        folder = root / f"{kind} moved"
        train(folder, *CUT, *overrides, "train.exit_every=3", processes=2)
        out[f"{kind} moved"] = run(folder.name, *overrides)
    return out


def test_the_losses_are_those_of_autocast_within_bf16(runs):
    expected, _ = runs["autocast"]
    for name, (losses, _) in runs.items():
        assert losses == pytest.approx(expected, rel=2e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_and_ranks(runs, kind):
    losses, folder = runs[kind]
    assert runs[f"{kind} resumed"][0] == losses
    whole = state_at(folder, 6)
    resumed = state_at(runs[f"{kind} resumed"][1], 6)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # The first three on two ranks, which sum in another order.
    assert runs[f"{kind} moved"][0] == pytest.approx(losses, rel=2e-4)


def test_checkpoints_hold_fp32_masters_or_bf16(runs):
    masters = state_at(runs["masters"][1], 6)
    assert masters.keys() == state_at(runs["autocast"][1], 6).keys()
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    # More than bf16 holds: the masters themselves, which no rounding of the start ever touched.
    weight = masters["model.embed.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    rounded = open_model(runs["rounded"][1]).tensors
    assert {rounded[name].dtype for name in rounded} == {torch.bfloat16}


def test_what_does_not_go_together_is_refused(train, tmp_path):
    for key in ("train.parameters=bf16", "train.gradients=bf16"):
        for precision in ("fp32", "fp16", "auto"):
            with pytest.raises(ConfigError, match="precision=bf16"):
                load_config([*train.base, f"output={tmp_path}", key, f"precision={precision}"])
