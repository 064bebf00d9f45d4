"""Experts in the loop: another micro-batch routes the same tokens to the same experts, and neither
recomputation nor validations are counted."""

import pytest
import torch

from castalia.distributed import World
from castalia.experts.ledger import Ledger
from castalia.recipes import load_config
from castalia.train.hooks import Metrics
from castalia.train.trainer import Trainer

ROWS = 12
LENGTH = 16
OPTIONS = (
    *("debug", "model.num_layers=3", "model.hidden_size=32", f"data.seq_length={LENGTH}"),
    *("model.moe.experts=4", "model.moe.top_k=1", "model.moe.interval=2"),
    *("model.moe.bias_rate=0.02", "model.moe.z_loss=0.001", "model.moe.jitter=0.05"),
    *("model.moe.capacity_factor=1.25", "model.moe.shared_size=8", "data.split='50,50,0'"),
    *("train.steps=3", "train.eval_every=1", f"train.batch_size={ROWS}", "train.log_every=1"),
)


@pytest.fixture
def trained(tokens, read_lines, tmp_path, monkeypatch):
    """Callable that trains; returns the lines of the metrics, and what the ledger held at the end
    of each step."""

    def run(name, *overrides):
        held = []

        def take(self, device, take=Ledger.take):
            sums = take(self, device)
            held.append(sums.view(len(self.places), -1))
            return sums

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "take", take)
            output = tmp_path / name
            words = [*OPTIONS, *overrides, f"data.train={tokens}", f"output={output}"]
            alone = World(0, 1, torch.device("cpu"))
            Trainer(load_config(words), alone, hooks=[Metrics()]).fit()
        return read_lines(output), held

    return run


def test_every_assignment_of_training_is_counted_once_however_it_is_cut(trained):
    whole, held = trained("whole")
    recomputed, again = trained("cut", "train.micro_batch_size=3", "train.recompute=true")
    for sums in (*held, *again):
        # Of both layers: assignments of the four experts, tokens and rows.
        assert sums[:, :4].sum(1).tolist() == [ROWS * LENGTH] * 2
        assert sums[:, 4:6].tolist() == [[ROWS * LENGTH, ROWS]] * 2
    assert len(held) == len(again) == len(whole) == len(recomputed) == 3
    for line in whole:
        layers = line["moe/layers"]
        assert [layer["layer"] for layer in layers] == [0, 2]
        worst = max(4 * max(layer["load"]) for layer in layers)
        assert line["moe/load_max"] == pytest.approx(worst)
        # A row of 16 tokens has room for 5 at each of 4 experts.
        assert 0 < line["moe/dropped"] < 1
        assert 0 < line["moe/entropy"] < 1.3863
        assert 0.9 < line["moe/aux_loss"] < 4
        assert line["moe/z_loss"] > 0
    for ours, theirs in zip(recomputed, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["moe/aux_loss"] == pytest.approx(theirs["moe/aux_loss"], rel=1e-5)
        for mine, other in zip(ours["moe/layers"], theirs["moe/layers"], strict=True):
            assert mine["load"] == other["load"]
            assert mine["dropped"] == other["dropped"]
