"""Golden values of GPT-NeoX's schedules, and the shapes of the others."""

import pytest

from castalia.optim.schedule import ScheduleConfig, make_schedule

PYTHIA_410M = {"lr": 3e-4, "steps": 143000}
GOLDEN = [
    # updates made, GPT-NeoX today, GPT-NeoX v1.0 (which trained Pythia)
    (0, 2.09790e-7, 0.0),
    (1, 2.09790e-7, 2.09790e-7),
    (1430, 3e-4, 3e-4),
    (50000, 2.288886e-4, 2.224074e-4),
    (72215, 1.65e-4, 1.523561e-4),
    (100000, 8.693654e-5, 6.596025e-5),
    (120000, 4.720554e-5, 3e-5),
]


@pytest.mark.parametrize(("n", "today", "v1"), GOLDEN)
def test_golden_cosine(n, today, v1):
    for name, expected in (("cosine", today), ("cosine_neox_v1", v1)):
        config = ScheduleConfig(name=name, warmup=0.01, min_lr=3e-5)
        assert make_schedule(config, **PYTHIA_410M)(n) == pytest.approx(
            expected, rel=2e-6, abs=1e-14
        )


def test_v1_reaches_its_floor_at_115139_and_stays():
    rate = make_schedule(ScheduleConfig(name="cosine_neox_v1", min_lr=3e-5), **PYTHIA_410M)
    assert rate(115138) > 3e-5
    assert rate(115139) == rate(142999) == 3e-5


def test_v1_relative_rate_in_mid_run():
    rate = make_schedule(ScheduleConfig(name="cosine_neox_v1", min_lr=0.1), lr=1.0, steps=143000)
    assert rate(71500) == pytest.approx(0.516, abs=5e-4)
    assert rate(113000) == pytest.approx(0.115, abs=1e-3)


def test_linear_exponential_and_constant():
    def rate(name, n):
        return make_schedule(
            ScheduleConfig(name=name, warmup=0.1, min_lr=0.01), lr=1.0, steps=1000
        )(n)

    assert rate("linear", 550) == pytest.approx(0.5)
    assert rate("linear", 1000) == 0.01
    assert rate("exponential", 1000) == pytest.approx(0.50007, abs=1e-5)
    assert rate("constant", 50) == pytest.approx(0.5) and rate("constant", 999) == 1.0


def test_wsd_is_flat_and_then_falls_to_the_floor():
    rate = make_schedule(
        ScheduleConfig(name="wsd", warmup=0, min_lr=0.1, decay_share=0.2), lr=1.0, steps=1000
    )
    assert rate(0) == rate(799) == 1.0
    assert rate(900) == pytest.approx(0.55)
    assert rate(1000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name", ["cosine", "cosine_neox_v1", "linear", "exponential", "constant", "wsd"]
)
def test_no_rate_exceeds_the_peak_even_in_a_tiny_run(name):
    for steps in (1, 2, 5, 60):
        rate = make_schedule(
            ScheduleConfig(name=name, warmup=0.01, min_lr=0.0), lr=1.0, steps=steps
        )
        assert all(0 <= rate(n) <= 1.0 for n in range(steps + 3))


def test_horizon_of_its_own():
    short = make_schedule(
        ScheduleConfig(name="linear", warmup=0, decay_steps=10), lr=1.0, steps=100
    )
    assert short(5) == pytest.approx(0.5) and short(10) == short(99) == 0.0


def test_a_warmup_over_the_whole_horizon():
    for name in ("cosine", "linear", "exponential", "constant", "wsd"):
        rate = make_schedule(ScheduleConfig(name=name, warmup=1), lr=1.0, steps=10)
        assert [rate(n) for n in range(11)] == pytest.approx([0.1, *[n / 10 for n in range(1, 11)]])
    # v1.0 rises no longer than its decay lasts, which is not at all here.
    with pytest.raises(ValueError, match="has rate 0 at every step; use"):
        ScheduleConfig(name="cosine_neox_v1", warmup=1)
