"""The plan of a suite: counted without data, and checked against the published runs."""

import json
import subprocess
import sys

import pytest

from castalia.core.errors import ConfigError
from castalia.results.suites import PYTHIA_SIZES
from castalia.suites import open_suite
from castalia.suites.planning import plan_suite


@pytest.fixture(scope="module")
def planned():
    """The plan of all 20 runs of Pythia."""
    return plan_suite(open_suite("pythia"))


def test_the_plan_of_pythia(planned):
    assert len(planned.runs) == 20 and planned.total["runs"] == 20
    for run in planned.runs:
        assert run.parameters == PYTHIA_SIZES[run.size]
        assert (run.steps, run.tokens, run.checkpoints) == (143_000, 299_892_736_000, 154)
        # fp32 weights and the two moments of AdamW.
        assert run.disk_bytes == 154 * 12 * run.parameters == 3 * run.weight_bytes
        assert run.recipe == f"pythia-{run.size}" + "-deduped" * (run.data == "deduped")
    assert planned.total["tokens"] == 20 * 299_892_736_000
    assert planned.total["disk_bytes"] == sum(run.disk_bytes for run in planned.runs)


def test_published_hours_mean_plausible_shares_of_the_peak(planned):
    """6N and the attention per token at 312 TFLOP/s: the eight sizes reached 18% to 35%."""
    shares = {run.size: run.published_mfu for run in planned.runs if run.published_mfu}
    expected = {"70m": 0.18, "160m": 0.25, "410m": 0.29, "1b": 0.35, "1.4b": 0.34}
    expected |= {"2.8b": 0.34, "6.9b": 0.34, "12b": 0.27}
    assert shares == pytest.approx(expected, abs=0.006)
    assert planned.total["published_gpu_hours"] == 2 * 136_070
    for run in planned.runs:
        if run.published_gpu_hours:
            hours = run.gpu_hours * planned.mfu / run.published_mfu
            assert hours == pytest.approx(run.published_gpu_hours)


def test_another_run_has_no_published_hours():
    shorter = plan_suite(open_suite(["pythia", "train.steps=1000"], only="70m,standard"), mfu=0.5)
    (run,) = shorter.runs
    assert run.published_gpu_hours is None and run.checkpoints == 12
    assert run.gpu_hours == pytest.approx(305.515 / 143 * 0.3 / 0.5, rel=1e-4)
    seeds = plan_suite(open_suite("pythia", only="14m,standard", seeds="1,2"))
    assert [(run.name, run.seed) for run in seeds.runs] == [("14m-seed1", 1), ("14m-seed2", 2)]
    with pytest.raises(ConfigError, match="unknown GPU 'a100'; choose one of"):
        plan_suite(open_suite("mini"), gpu="a100")


def test_a_plan_needs_no_torch():
    code = (
        "import sys; from castalia.cli import main\n"
        "sys.argv = ['castalia', 'suite', 'pythia', '--plan', '--json', '--only', '12b-deduped']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["runs"][0]["name"] == "12b-deduped" and values["total"]["runs"] == 1
