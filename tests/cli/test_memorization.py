"""`castalia memorization`: a line for each scan, JSON, one-sentence errors."""

import json
from pathlib import Path

import numpy as np
from tests.fixtures.scans import scan_file, scan_table


def test_lines_json_and_errors(tmp_path: Path, command):
    table = scan_table({4: np.array([32, 1, 2, 3]), 8: np.array([32, 32, 2, 3] * 2)})
    file = scan_file(tmp_path / "70m.parquet", table)
    output = tmp_path / "study"
    code, out, err = command("memorization", file, "--output", output)
    assert (code, err) == (0, "")
    assert "70m at 8: 4 of 8 rows memorized (50.000%), mean score 0.5391" in out
    assert "One model: nothing is said" in out and str(output / "memorization.html") in out
    code, out, err = command("memorization", file, "-o", output, "--steps", "8", "--json")
    values = json.loads(out)
    assert (code, err) == (0, "") and values["files"][0]["checkpoints"] == [8]
    assert values["shares"][0]["memorized"] == 4 and values["predictions"] == []
    # A table without a line has no file, also where an earlier study left one.
    assert not (output / "predictions.csv").exists() and (output / "shares.csv").exists()
    code, out, err = command("memorization", file, "-o", file)
    assert code == 2 and out == "" and "is a file; name a folder" in err
    code, _, err = command("memorization", tmp_path / "x.parquet", "-o", output)
    assert code == 2 and len(err.splitlines()) == 1 and "castalia memorize --output" in err
