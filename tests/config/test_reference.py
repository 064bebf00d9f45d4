"""The keys of a config as a reference, on the screen and in the docs."""

import json
import subprocess
import sys
from pathlib import Path

from castalia.config.fields import leaves
from castalia.config.reference import entries
from castalia.runs.config import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def keys(*words):
    """Output of `castalia show --keys WORDS`, in a process without the guests of other tests."""
    command = [sys.executable, "-m", "castalia", "show", "--keys", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_current_and_names_every_key():
    text = PAGE.read_text()
    assert text == keys("--markdown"), "the page is not current: run `make docs`"
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert len(listed) == len(set(listed))
    found = json.loads(keys("--json"))
    assert [entry["key"] for entry in found] == listed
    # A key that holds a section, or a list of them, is no leaf itself.
    plain = {entry["key"] for entry in found if "section" not in entry["values"]}
    assert plain <= set(leaves(RunConfig))


def test_every_key_has_its_values_default_and_meaning():
    found = {entry.key: entry for entry in entries(RunConfig)}
    # Guests of other tests are members like any other: a key more is no fault.
    assert set(leaves(RunConfig)) <= found.keys()
    assert all(entry.text and "\n" not in entry.text and entry.values for entry in found.values())
    assert all("value" not in entry.values.split() for entry in found.values())
    facts = {key: found[key][1:3] for key in found}
    assert facts["optim.clip"] == ("number > 0 | null", "1")
    assert facts["mixing.floor"] == ("number >= 0, <= 1", "0")
    assert facts["precision"][0].startswith("auto | fp32 | bf16 | fp16")
    assert facts["train.recompute"] == ("true or false | full | selective | integer > 0", "false")
    assert facts["guard.skip_steps"] == ("list of integer > 0", "[]")
    assert facts["model.hidden_size"] == ("integer > 0", "required")
    assert facts["launch.include"] == ("text", '""')
    assert facts["mixing.exhaustion"] == ("text | mapping", "repeat")
    assert found["train.steps"].at_resume and not found["train.batch_size"].at_resume
