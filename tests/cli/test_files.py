"""Files that may not be looked at: a sentence, whatever verb was given them."""

import subprocess
import sys

import pytest

LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["data", "inspect", LONG],
        ["data", "contamination", LONG, "--with", "a.txt"],
        ["prepare", "a.txt", "--tokenizer", LONG, "--output", "x"],
        ["prepare", LONG, "--tokenizer", "bytes", "--output", "x"],
    ],
)
def test_a_name_that_is_too_long_is_a_sentence(words, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    command = [sys.executable, "-m", "castalia", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"castalia: error: {LONG}")
    assert done.stderr.count("\n") == 1 and "File name too long" in done.stderr
