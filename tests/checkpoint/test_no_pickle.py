import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("unpickling.py")
ROOM = Path(__file__).resolve().parents[2] / "src" / "castalia" / "checkpoint"


def test_no_load_unpickles_even_from_hostile_folders(tmp_path):
    command = [sys.executable, "-W", "ignore", PROGRAM, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seen"] == 0
    assert result["control"] > 0
    assert result["refused"] == dict.fromkeys(("2", "3", "4", "read 2", "read 3", "read 4"), True)
    assert result["sprung"] is False


def test_the_room_names_no_pickle_loader():
    loaders = re.compile(
        r"import pickle|torch\.load\b|distributed\.checkpoint"
        r"|allow_pickle=True|yaml\.(unsafe_)?load\b"
    )
    paths = set(ROOM.rglob("*.py")) - {ROOM / "pickled.py"}
    assert len(paths) > 15
    for path in paths:
        assert not loaders.search(path.read_text()), path


def test_foreign_pickles_are_read_as_tensors_alone():
    text = (ROOM / "pickled.py").read_text()
    calls = re.findall(r"torch\.load\(.*\)", text)
    assert len(calls) == 1 and "weights_only=True" in calls[0]
