"""Weights kept in bf16: masters, stochastic rounding, one parameter at a time."""

import pytest
import torch
from torch import nn

from castalia.distributed.boxes import Box
from castalia.optim import AdamWConfig, Rules
from castalia.optim.masters import Storage, places, round_stochastically
from castalia.optim.updater import Updater

CONFIG = AdamWConfig(lr=1e-2, weight_decay=0.1)
STEPS = 5


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))


def trained(storage: Storage, dtype: torch.dtype, seed: int = 1) -> tuple[nn.Module, Updater]:
    """A small model after some updates with random gradients that arrive in `dtype`."""
    model = small()
    if storage.parameters == "bf16_stochastic":
        model.to(torch.bfloat16)
    updater = Updater(model, Rules(CONFIG), storage)
    random = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=random).bfloat16()
            parameter.grad_dtype = dtype
            parameter.grad = gradient.to(dtype)
        updater.step(1e-2)
        updater.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    return model, updater


def test_masters_are_the_fp32_weights_and_the_model_has_their_rounding():
    plain, _ = trained(Storage(), torch.float32)
    expected = dict(plain.named_parameters())
    # Gradients in bf16 go through one fp32 copy at a time, with the same result.
    for dtype in (torch.float32, torch.bfloat16):
        model, updater = trained(Storage("bf16"), dtype)
        masters = updater.weights.masters()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(masters[name], expected[name]), (name, dtype)
            assert torch.equal(parameter, masters[name].bfloat16())
        assert all(tensor.dtype == torch.float32 for tensor in updater.tensors().values())
    # fp32 parameters with bf16 gradients are the third case that steps one at a time.
    model, _ = trained(Storage(gradients="bf16"), torch.bfloat16)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_masters_take_over_what_a_checkpoint_fills():
    model, updater = trained(Storage("bf16"), torch.float32)
    updater.weights.masters()["1.weight"].fill_(0.3)
    updater.restore(STEPS)
    assert torch.equal(model[1].weight, torch.full((4, 5), 0.3).bfloat16())


def test_stochastic_updates_depend_on_seed_and_step_alone():
    models = [
        trained(Storage("bf16_stochastic", seed=seed), torch.bfloat16)[0] for seed in (7, 7, 8)
    ]
    one, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, again) and not torch.equal(one, other)
    plain, _ = trained(Storage(), torch.float32)
    expected = torch.cat([p.flatten() for p in plain.parameters()])
    # 2^-7 is the distance of neighbouring bf16 numbers around 1; five updates, each rounded.
    assert (one.float() - expected).abs().max() < STEPS * 2**-7


def test_small_updates_count_in_expectation():
    """Below half of bf16's resolution, where rounding to nearest never moves."""
    weights = torch.ones(400, 500, dtype=torch.bfloat16)
    assert torch.equal((weights.float() + 1e-3).bfloat16(), weights)
    for update in range(10):
        round_stochastically(weights.float() + 1e-3, weights, f"1:{update}:w")
    # Each number is a sum of ten draws of 2^-7; the mean of 200,000 has a deviation of 1.5e-5.
    assert weights.double().mean().item() == pytest.approx(1.01, abs=6e-5)
    assert len(weights.unique()) > 3


@pytest.mark.parametrize("value", [0.1, -0.1, 3.14159, -1e-30, 65504.1, 0.0, 1.5])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(value):
    count = 1 << 17
    wide = torch.full((count,), value)
    out = torch.empty(count, dtype=torch.bfloat16)
    round_stochastically(wide, out, "key")
    down = (wide.view(torch.int32) & -65536).view(torch.float32)[0].double().item()
    up = ((wide.view(torch.int32) & -65536) + 65536).view(torch.float32)[0].double().item()
    assert set(out.double().unique().tolist()) <= {down, up}
    # Five standard deviations of the mean of draws between two neighbours.
    assert out.double().mean().item() == pytest.approx(
        wide[0].double().item(), abs=5 * abs(up - down) / 2 / count**0.5
    )


def test_what_is_not_finite_stays_so():
    # A GPU's NaN has all bits set: a carry would make it -0.
    bits = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000], dtype=torch.int32)
    out = torch.empty(3, dtype=torch.bfloat16)
    round_stochastically(bits.view(torch.float32), out, "key")
    assert out[0].isnan() and out[1:].tolist() == [float("inf"), float("-inf")]


def test_draws_depend_on_the_place_in_the_whole_tensor(monkeypatch):
    """Every part of a tensor, however it is cut, counts its numbers as the whole does."""
    monkeypatch.setattr("castalia.optim.masters.CHUNK", 7)
    shape = (5, 4, 3)
    whole = torch.arange(60).view(shape)
    for box in (Box((0, 0, 0), shape), Box((2, 1, 0), (3, 2, 3)), Box((4, 0, 2), (1, 4, 1))):
        seen = 0
        for part, numbers in places(box, shape, torch.device("cpu")):
            assert torch.equal(numbers, whole[part.slices])
            seen += numbers.numel()
        assert seen == box.volume
    ((_, number),) = places(Box((), ()), (), torch.device("cpu"))
    assert number.item() == 0
