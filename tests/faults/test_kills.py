"""A short campaign of random kills; benchmarks/results/kills.json has the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_jobs_killed_at_random_end_as_if_undisturbed():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", "--kills", "60", "--seed", "7"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Each kind has its share, rounded down.
    assert "59 kills in" in done.stdout
