"""The arithmetic of the mixing benchmark: what counts as iterations saved, and what is chance."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WEIGHTS = np.array([0.5, 0.5])


@pytest.fixture(scope="module")
def numbers() -> ModuleType:
    """benchmarks/mixing_numbers.py."""
    path = BENCHMARKS / "mixing_numbers.py"
    spec = importlib.util.spec_from_file_location("mixing_numbers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(losses, steps=(10, 20, 40, 80)):
    """A result whose two sources have the same loss."""
    return {
        "curve": [[step, loss, loss] for step, loss in zip(steps, losses, strict=True)],
        "outside": [1.0, 3.0],
    }


def test_isotonic_regression(numbers):
    """A rise is pooled with what stands before it, as far back as it takes."""
    np.testing.assert_allclose(numbers.falling(np.array([5.0, 3.0, 4.0, 1.0])), [5, 3.5, 3.5, 1])
    np.testing.assert_allclose(numbers.falling(np.array([1.0, 2.0, 6.0])), [3, 3, 3])
    np.testing.assert_allclose(numbers.falling(np.array([4.0, 3.0, 2.0])), [4, 3, 2])


def test_iterations_saved(numbers):
    """The base ends at 2 at step 80; the arm reaches it between steps 20 and 40, midway in log."""
    base, arm = run([5, 4, 3, 2]), run([4, 3, 1, 0.5])
    assert numbers.saved(arm, base, WEIGHTS) == pytest.approx(1 - 20 * 2**0.5 / 80)
    assert numbers.saved(base, arm, WEIGHTS) == pytest.approx(-(1 - 20 * 2**0.5 / 80))
    assert numbers.saved(base, base, WEIGHTS) == pytest.approx(0, abs=1e-12)


def test_a_shorter_run_is_measured_in_steps_of_the_base(numbers):
    """A confirmation run counts its own steps against those of the base."""
    assert numbers.saved(run([5, 4, 2], (10, 20, 40)), run([5, 4, 3, 2]), WEIGHTS) == pytest.approx(
        0.5
    )


def test_noise_of_equal_arms_has_no_side(numbers):
    """Every pair of seeds is taken both ways, so the spread is even."""
    runs = {seed: run([5, 4, 3, 2 + 0.1 * seed]) for seed in range(4)}
    noise = numbers.noise_floor(runs, WEIGHTS)
    assert noise["low"] == pytest.approx(-noise["high"])
    assert noise["high"] > 0


def test_metrics(numbers):
    """Each metric by hand."""
    result = {"curve": [[10, 1.0, 3.0]], "outside": [1.0, 3.0]}
    found = numbers.metrics(result, np.array([0.9, 0.1]), np.array([1.0, 2.5]))
    assert found == pytest.approx(
        {"M1": 2.0, "M1 ppl": (np.e + np.e**3) / 2, "M2": 1.2, "M3": 0.5, "M4": 2.0}
    )


def test_against(numbers):
    """Medians over the seeds that both have, and an interval that holds them."""
    base = {seed: run([5, 4, 3, 2]) for seed in (1, 2, 3)}
    arm = {seed: run([4, 3, 2 - 0.1 * seed, 1]) for seed in (1, 2, 4)}
    found = numbers.against(arm, base, WEIGHTS)
    assert sorted(found["by_seed"]) == [1, 2]
    assert found["low"] <= found["saved"] <= found["high"]
    assert found["nats"] == pytest.approx(1.0)


def test_steps_saved_of_mean_curves(numbers):
    """As of single curves. Where seeds end off their mean in one arm only, there is an interval."""

    def row(losses, ends):
        return {"curves": {"M1": [[10, 20, 40, 80], losses]}, "by_seed": {"M1": ends}}

    base, arm = row([5, 4, 3, 2], {1: 1.9, 2: 2.1}), row([4, 3, 1, 0.5], {"1": 0.4, "2": 0.6})
    found = numbers.saved_of_means(arm, base, "M1")
    exact = pytest.approx(1 - 20 * 2**0.5 / 80)
    assert found == {"saved": exact, "low": exact, "high": exact}
    wide = numbers.saved_of_means(row([4, 3, 1, 0.5], {"1": 0.6, "2": 0.4}), base, "M1")
    assert wide["low"] < wide["saved"] < wide["high"]
    assert numbers.saved_of_means(arm, base, "M2") is None


def test_the_share_of_steps_saved_against_natural(numbers):
    """What README and docs/mixing.md say of the committed curves."""
    results = json.loads((BENCHMARKS / "results" / "mixing.json").read_text())["arms"]
    natural = results["natural"]
    saved = {
        arm: numbers.saved_of_means(results[arm], natural, "M1")
        for arm in ("odm", "odm-repo", "progress", "uniform", "ado")
    }
    percent = {arm: round(100 * gain["saved"]) for arm, gain in saved.items()}
    assert percent == {"odm": 51, "odm-repo": 51, "progress": 54, "uniform": 54, "ado": 36}
    intervals = [(round(100 * gain["low"]), round(100 * gain["high"])) for gain in saved.values()]
    assert intervals == [(47, 53), (50, 53), (52, 56), (51, 56), (32, 38)]
    repeat = json.loads((BENCHMARKS / "results" / "mixing-small-perplexity.json").read_text())
    percent = {
        arm: round(100 * repeat["arms"][arm]["against_natural"]["M1 ppl"]["saved"]) for arm in saved
    }
    assert percent == {"odm": 71, "odm-repo": 71, "progress": 72, "uniform": 71, "ado": 57}


def test_steps_saved_seed_by_seed(numbers):
    """The median over the seeds that both arms have, on the mean of the sources' perplexities."""
    base = {seed: run([5, 4, 3, 2]) for seed in (1, 2, 3)}
    arm = {seed: run([4, 3, 2 - 0.1 * seed, 1]) for seed in (1, 2, 4)}
    found = numbers.saved_by_seed(arm, base, numbers.perplexity_curve)
    assert sorted(found["by_seed"]) == [1, 2]
    assert 0.5 < found["low"] <= found["saved"] <= found["high"] < 0.55
    np.testing.assert_allclose(numbers.perplexity_curve(arm[1])[1], np.exp([4, 3, 1.9, 1]))
