"""Signals and lost readers: what is saved, the exit status, and what the user reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from castalia.checkpoint.store import complete_steps
from castalia.data import IndexedDatasetWriter

EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "rows_hash")
VALIDATED = ("train.eval_every=2", "train.eval_batches=30", "mixing.kind=naive-validation")
CASES = {
    "one Ctrl-C": {"at": "step", "seconds": 0.3, "signals": ["SIGINT"]},
    "two": {"at": "step", "seconds": 60, "signals": ["SIGINT", "SIGINT"]},
    "two in the save": {"at": "save", "seconds": 60, "signals": ["SIGINT", "SIGINT"]},
    "SIGTERM twice in the save": {"at": "save", "seconds": 0.2, "signals": ["SIGTERM", "SIGTERM"]},
    "SIGTERM": {"at": "step", "seconds": 0.3, "signals": ["SIGTERM"]},
    "SIGHUP": {"at": "step", "seconds": 0.3, "signals": ["SIGHUP"]},
    "nohup": {"at": "step", "seconds": 0.3, "signals": ["SIGHUP"], "ignore": "SIGHUP"},
    "in a validation": {"at": "validation", "seconds": 1, "signals": ["SIGTERM"]},
    "tee": {"at": "step", "seconds": 0.3, "signals": ["SIGINT"], "reader": "gone"},
    "head": {"at": "step", "seconds": 0.3, "signals": [], "reader": "gone"},
    "one of two ranks": {"at": "step", "seconds": 0.3, "signals": ["SIGINT"], "ranks": 2},
    "two ranks in a validation": {
        "at": "validation", "seconds": 1, "signals": ["SIGUSR1"], "ranks": 2,
    },
    "resumed": {"at": "nothing", "signals": []},
    "whole": {"at": "nothing", "signals": []},
}  # fmt: skip
"""What stopping.py does to each run of four steps; the slow part begins after two."""


@pytest.fixture(scope="module")
def ended(train, tokens, program, tmp_path_factory) -> dict[str, dict]:
    """How each case ended."""
    folder = tmp_path_factory.mktemp("stopped")
    base = [*train.base, "train.steps=4", "train.batch_size=4", "checkpoint.every=null"]
    base += ["checkpoint.steps=[0]", "data.tokenizer=null"]
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(folder / "other", "uint16") as writer:
        for size in random.integers(20, 60, 40):
            writer.add(random.integers(97, 100, size))
    other = folder / "other"
    sources = f"data.train=[{tokens},{other}] data.valid=[{tokens},{other}]".split()
    plans = []
    for name, case in CASES.items():
        arguments = [*base, f"output={folder / name}"]
        if "validation" in name or name in ("resumed", "whole"):
            arguments += [*sources, *VALIDATED]
        if case["at"] == "save":
            arguments += ["train.steps=3"]
        if name == "head":
            # The line of step 3 is the first that nobody reads, and step 4 the last.
            arguments += ["train.steps=5"]
        if name == "resumed":
            arguments += [f"output={folder / 'in a validation'}"]
        plans.append(case | {"arguments": arguments})
    done = program(Path(__file__).with_name("stopping.py"), json.dumps(plans))
    assert done.returncode == 0, done.stderr
    cases = dict(zip(CASES, json.loads(done.stdout), strict=True))
    for name, case in cases.items():
        case["folder"] = folder / ("in a validation" if name == "resumed" else name)
        case["saved"] = complete_steps(case["folder"] / "checkpoints")
    return cases


def lines(case):
    text = (case["folder"] / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "code", "steps"),
    [
        ("one Ctrl-C", 130, 3),
        ("SIGTERM", 0, 3),
        ("SIGHUP", 0, 3),
        ("SIGTERM twice in the save", 0, 3),
        ("nohup", 0, 4),
        ("tee", 130, 3),
        ("head", 141, 4),
        ("one of two ranks", 130, 3),
    ],
)
def test_the_step_is_finished_and_saved(ended, name, code, steps):
    case = ended[name]
    assert set(case["codes"]) == {code}, case
    assert case["saved"] == [0, steps] and lines(case)[-1]["step"] == steps
    said = case["out"] + case["err"]
    if name not in ("nohup", "SIGTERM twice in the save"):
        where = case["folder"] / "checkpoints" / f"step-{steps:08d}"
        assert f"{where} is saved; the same command resumes" in said
    # One line a request, and one of the end.
    asked = [line for line in case["err"].splitlines() if line.startswith("castalia: SIG")]
    assert len(asked) == (name not in ("nohup", "head")), case["err"]
    assert "Traceback" not in said + case["other"]


@pytest.mark.parametrize("name", ["two", "two in the save"])
def test_the_second_ctrl_c_ends_at_once(ended, name):
    case = ended[name]
    assert case["codes"] == [130] and case["seconds"] < 50 and case["saved"] == [0]
    first, second = case["err"].splitlines()
    assert first.endswith("; Ctrl-C again stops at once")
    newest = case["folder"] / "checkpoints" / "step-00000000"
    assert second == (
        f"castalia: stopped at once; the newest checkpoint is {newest}; the same command resumes"
    )


@pytest.mark.parametrize("name", ["in a validation", "two ranks in a validation"])
def test_a_validation_is_broken_off(ended, name):
    """Of thirty batches a few are done; the run saves the step that was validated."""
    case = ended[name]
    assert set(case["codes"]) == {0} and 0 < case["batches"] < 30, case
    assert "is saved; the same command resumes" in case["out"]
    assert 2 in case["saved"]


def test_a_validation_that_was_broken_off_is_made_up_for(ended):
    """Its mixer learns from the validations: without it the rows would be others."""
    resumed, whole = lines(ended["resumed"]), lines(ended["whole"])
    assert [[line[key] for key in EXACT] for line in resumed] == [
        [line[key] for key in EXACT] for line in whole
    ]
    assert "valid_loss" not in resumed[1]
    assert resumed[2]["valid_loss"] == whole[1]["valid_loss"]
    assert resumed[3]["valid_loss"] == whole[3]["valid_loss"]
