"""Activations away from where they were made: the same gradients, and only what is large."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from castalia.distributed import World
from castalia.models import Decoder, offload
from castalia.models.offload import Away, Offload
from castalia.recipes import load_config
from castalia.train.machine_precision import offload_notes
from castalia.train.passes import make_passes

CPU = torch.device("cpu")


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_same_and_activations_were_away(monkeypatch, recompute):
    monkeypatch.setattr(offload, "SMALLEST", 1 << 10)
    config = load_config(["debug", "model.num_layers=2", "model.hidden_size=32"])
    model = Decoder(config.model)
    model.recompute = recompute
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(40).view(2, 20)
    away = Offload(model, CPU)
    packed = []
    pack = away.pack

    def counted(tensor):
        out = pack(tensor)
        packed.append(isinstance(out, Away))
        return out

    away.pack = counted
    gradients = []
    for context in (torch.enable_grad(), away.around(nullcontext())):
        model.zero_grad()
        with context:
            total = model(tokens).square().sum()
        total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert any(packed) and not all(packed)


def test_weights_their_copies_and_small_tensors_stay(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1 << 10)
    away = Offload(nn.Linear(64, 32), CPU)
    assert away.goes(torch.zeros(40, 64))
    assert not away.goes(torch.zeros(32, 64).bfloat16())
    assert not away.goes(torch.zeros(32, 64).t())
    assert not away.goes(torch.zeros(2, 64))
    assert not away.goes(torch.zeros(1, 64).expand(40, 64))


def test_a_cpu_has_nothing_to_offload():
    config = load_config(["debug", "train.offload_activations=true", "model.num_layers=1"])
    passes = make_passes(Decoder(config.model), None, config, World(0, 1, CPU), lambda: None)
    assert passes.offload is None
    assert "is without effect on a CPU" in offload_notes(config, CPU)[0]
