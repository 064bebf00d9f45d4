"""The other schedules against the formulas of transformers and torch."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, PolynomialLR
from transformers import (
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from castalia.core.errors import ConfigError
from castalia.optim.schedule import ScheduleConfig, make_schedule
from castalia.recipes import load_config

PEAK = 3e-3
STEPS = 200


def rates(steps=STEPS, **values):
    rate = make_schedule(ScheduleConfig(**values), PEAK, steps)
    return [rate(n) for n in range(steps + 3)]


def theirs(make, **values):
    """The rates of a scheduler of torch or transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **values)
    out = []
    for _ in range(STEPS + 3):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


WARM = {"num_warmup_steps": 20}
WHOLE = WARM | {"num_training_steps": STEPS}
OURS = {
    "wsd linear": {"name": "wsd", "fall_steps": 40, "min_lr": 3e-4},
    "wsd cosine": {"name": "wsd", "fall_steps": 40, "min_lr": 3e-4, "fall": "cosine"},
    "wsd root": {"name": "wsd", "fall_steps": 40, "min_lr": 3e-4, "fall": "one_minus_sqrt"},
    "restarts": {"name": "cosine_restarts", "cycles": 3},
    "polynomial": {"name": "polynomial", "power": 2.0, "min_lr": 1e-4},
    "inverse_sqrt": {"name": "inverse_sqrt"},
    "timescale": {"name": "inverse_sqrt", "timescale": 55},
}
WSD = {"num_decay_steps": 40, "min_lr_ratio": 0.1, **WHOLE}
THEIRS = {
    "wsd linear": (get_wsd_schedule, WSD | {"decay_type": "linear"}),
    "wsd cosine": (get_wsd_schedule, WSD | {"decay_type": "cosine"}),
    "wsd root": (get_wsd_schedule, WSD | {"decay_type": "1-sqrt"}),
    "restarts": (get_cosine_with_hard_restarts_schedule_with_warmup, WHOLE | {"num_cycles": 3}),
    "polynomial": (
        get_polynomial_decay_schedule_with_warmup,
        WHOLE | {"lr_end": 1e-4, "power": 2.0},
    ),
    "inverse_sqrt": (get_inverse_sqrt_schedule, WARM),
    "timescale": (get_inverse_sqrt_schedule, WARM | {"timescale": 55}),
}


@pytest.mark.parametrize("shape", OURS)
def test_transformers_has_the_same_rates_behind_the_warmup(shape):
    make, values = THEIRS[shape]
    mine = rates(warmup_steps=20, **OURS[shape])
    # n = 0 is not wasted here; WSD's warmup of transformers begins at its floor.
    first = 20 if shape.startswith("wsd") else 1
    assert mine[first:] == pytest.approx(theirs(make, **values)[first:], rel=1e-12, abs=1e-18)
    assert mine[0] == mine[1] > 0


def test_torch_has_the_same_restarts_and_powers():
    mine = rates(name="cosine_restarts", warmup=0, period=10, period_factor=2, min_lr=1e-4)
    other = theirs(CosineAnnealingWarmRestarts, T_0=10, T_mult=2, eta_min=1e-4)
    assert mine == pytest.approx(other, rel=1e-9)
    assert mine[10] == mine[30] == mine[70] == mine[150] == PEAK
    mine = rates(name="polynomial", warmup=0, power=0.5)
    assert mine == pytest.approx(theirs(PolynomialLR, total_iters=STEPS, power=0.5), abs=1e-9)


def test_lower_peaks_and_long_cycles():
    mine = rates(name="cosine_restarts", warmup=0, period=50, peak_factor=0.5)
    assert [mine[n] for n in (0, 50, 100, 150, 200)] == [PEAK / 2**i for i in range(5)]
    # Every begin of a cycle, whatever the rounding of the logarithm.
    mine = rates(3000, name="cosine_restarts", warmup=0, period=7, period_factor=3)
    begins = [7 * (3**i - 1) // 2 for i in range(6)]
    assert [mine[n] for n in begins] == [PEAK] * 6
    assert all(mine[n - 1] < 0.1 * PEAK for n in begins[1:])


def test_infinite_cools_stays_and_falls():
    """Equations of arXiv:2403.08763, section 7.1."""
    shape = {"name": "infinite", "flat_lr": 1e-3, "min_lr": 1e-5, "fall": "exponential"}
    mine = rates(warmup_steps=0, decay_share=0.25, cooldown_share=0.5, **shape)
    for n in range(STEPS):
        if n < 100:
            expected = 1e-3 + (PEAK - 1e-3) / 2 * (1 + math.cos(math.pi * n / 100))
        else:
            expected = 1e-3 * (1e-5 / 1e-3) ** (max(0, n - 150) / 50)
        assert mine[n] == pytest.approx(expected, rel=1e-12)
    assert mine[STEPS] == mine[-1] == pytest.approx(1e-5)


def test_warming_up_again():
    """From the floor of the run before to the peak, then down over the steps that are left."""
    first = rates(100, name="cosine", warmup_steps=10, min_lr=3e-4)
    again = ScheduleConfig(
        name="cosine", warmup_steps=10, warmup_start=3e-4, min_lr=1e-4, begin=100
    )
    rate = make_schedule(again, PEAK, 300)
    assert first[100] == 3e-4 and rate(101) == pytest.approx(3e-4 + (PEAK - 3e-4) / 10)
    assert rate(110) == PEAK and rate(300) == pytest.approx(1e-4)
    assert rate(205) == pytest.approx((PEAK + 1e-4) / 2)
    # A checkpoint of before the beginning has no rate of its own.
    assert rate(50) == rate(100)


def test_the_warmup_of_deepspeed():
    mine = rates(name="constant", warmup_steps=50, warmup_start=1e-4, warmup_shape="log")
    for n in range(1, 50):
        share = math.log(n + 1) / math.log(50)
        assert mine[n] == pytest.approx(1e-4 + (PEAK - 1e-4) * min(1, share))
    assert mine[51] == PEAK


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.power=2"], "schedule.power has no effect on constant; it belongs to poly"),
        (["schedule.name=wsd", "schedule.fall=exponential"], "set min_lr above 0"),
        (["schedule.name=cosine_restarts", "schedule.period_factor=2"], "set period"),
        (["schedule.name=cosine_restarts", "schedule.period=9", "schedule.cycles=2"], "one of"),
        (["schedule.warmup_start=1"], "schedule.warmup_start 1 is above optim.lr"),
        (["schedule.name=infinite", "schedule.flat_lr=1"], "schedule.flat_lr 1 is above optim.lr"),
        (["schedule.begin=3"], "schedule.begin 3 counts the updates of an earlier run"),
        (["schedule.name=cosine_neox_v1", "schedule.warmup_shape=log"], "rises linearly from 0"),
    ],
)
def test_options_that_do_nothing(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["debug", *overrides])
