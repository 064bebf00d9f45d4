"""The time of a step, measured on a piece of the model."""

import pytest
import torch

from castalia.cost.estimate import estimate
from castalia.recipes import load_config
from castalia.train import timing
from castalia.train.timing import piece_of, time_step


def test_the_piece_is_small_and_has_the_same_heads():
    model = load_config(["pythia-12b"]).model
    piece = piece_of(model, "cpu")
    assert (piece.num_layers, piece.hidden_size, piece.num_attention_heads) == (2, 768, 6)
    assert piece.hidden_size // piece.num_attention_heads == 128
    small = load_config(["debug"]).model
    assert piece_of(small, "cpu") == small.model_copy(update={"num_layers": 2})


@pytest.mark.parametrize("slow", [False, True])
def test_a_step_takes_its_flops_at_the_rate_of_the_piece(monkeypatch, slow):
    config = load_config(["debug", "device=cpu"])
    cost = estimate(config.workload)
    asked = []

    def best_seconds(model, precisions, device, rows, length):
        asked.append((rows, length))
        return [9.0 if slow else 1e-9 for _ in precisions]

    monkeypatch.setattr(timing, "best_seconds", best_seconds)
    # Four layers of the same kind for two: twice the FLOPs and a little more than that.
    whole = time_step(config, cost)
    tokens = 8 if slow else 512
    assert asked == ([(1, 8)] if slow else [(1, 8), (1, 64), (8, 64)])
    assert whole.about.startswith(f"2 of 4 layers, {tokens} tokens in fp32 on a CPU")
    one_pass = 9.0 if slow else 1e-9
    assert 1.7 < whole.seconds / (one_pass * 768 / tokens) < 2.1
    assert whole.tokens_per_second == pytest.approx(768 / whole.seconds)


def test_a_slow_start_does_not_decide_between_precisions(monkeypatch):
    config = load_config(["debug", "device=cpu"])
    times = {"fp32": [5.0], "bf16": []}  # the first pass of the process, then those of the machine

    def pass_seconds(model, precision, device, rows, length):
        return (
            times[precision].pop() if times[precision] else {"fp32": 0.01, "bf16": 0.13}[precision]
        )

    monkeypatch.setattr(timing, "pass_seconds", pass_seconds)
    ratio = timing.times_as_long(config, "fp32", "bf16", torch.device("cpu"))
    assert ratio == pytest.approx(1 / 13)


def test_a_device_that_is_not_here_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(["debug", "device=cuda"])
    assert time_step(config, estimate(config.workload)) is None


def test_precisions_are_timed_in_turns(monkeypatch):
    """A machine that is busy for a while slows both, and the best pass of each counts."""
    times = iter([9.0, 9.0, 2.0, 9.0, 3.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    asked = []

    def pass_seconds(model, precision, *size):
        asked.append(precision)
        return next(times)

    monkeypatch.setattr(timing, "pass_seconds", pass_seconds)
    assert timing.best_seconds(None, ["fp32", "bf16"], torch.device("cpu"), 1, 8) == [2.0, 1.0]
    assert asked == ["fp32", "bf16"] * timing.PASSES
    # What auto chooses is at most 5% slower than what it leaves.
    assert [timing.preferred(factor) for factor in (0.5, 1.04, 1.06)] == ["fp32", "fp32", "bf16"]
