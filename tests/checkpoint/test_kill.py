import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_saves.py")


@pytest.mark.parametrize("mode", ["new", "damaged"])
def test_kill_9_at_every_file_operation_of_a_save(tmp_path, mode):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, tmp_path, mode], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["deaths"] >= 45
    assert result["found"]["1"] >= 30  # killed before the rename
    assert (
        result["found"]["2"] >= 10
    )  # killed after it, while step 1 was deleted, and the one that was not killed
    assert result["found"]["1"] + result["found"]["2"] == result["deaths"] + 1
