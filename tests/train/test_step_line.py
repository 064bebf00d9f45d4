"""The lines on the screen: their width, what their numbers are means of, and the last one."""

import re

import pytest

from castalia.core.errors import TrainingError
from castalia.recipes import load_config
from castalia.train.hooks.step_line import fitted
from castalia.train.run import closing_line, require_training, run


@pytest.fixture
def config_of(train, tokens, tmp_path):
    """Callable that makes the config of a small run with validations."""
    base = [*train.base, f"output={tmp_path / 'run'}", f"data.valid={tokens}", "train.steps=7"]
    return lambda *overrides: load_config([*base, *overrides])


def test_lines_fit_and_are_means_since_the_line_before(config_of, read_lines, tmp_path, capsys):
    steps = ["train.log_every=3", "guard.skip_steps=[5]", "train.eval_every=6"]
    run(config_of(*steps, "train.eval_batches=1"), command=["castalia"])
    out = capsys.readouterr().out.splitlines()
    shown = [line for line in out if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/7", "3/7", "6/7", "7/7"]
    assert all(len(line) <= 80 for line in shown), shown
    lines = read_lines(tmp_path / "run")
    for line, covered in zip(shown, ([0], [1, 2], [3, 5], [6]), strict=True):
        for word, key in (("loss", "loss"), ("gnorm", "grad_norm")):
            mean = sum(lines[place][key] for place in covered) / len(covered)
            # Beside a validation and a skipped step there is no room for the norm.
            if word in line:
                number = float(re.search(rf"{word} ([0-9.]+)", line)[1])
                assert number == pytest.approx(mean, abs=6e-3)
    assert all("loss" in line for line in shown) and "gnorm" in shown[1]
    assert "skipped 1 (asked)" in shown[2] and "valid " in shown[2]
    last = out[-1]
    loss = sum(lines[place]["loss"] for place in (3, 5, 6)) / 3
    valid = lines[5]["valid_loss"]
    assert last.startswith(f"done: step 7 of 7, loss {loss:.4f}, validation {valid:.4f}, 1.34k ")
    assert re.search(r" tokens in \d+s, [0-9.]+k? tokens/s; saved in .*step-00000007; next: ", last)
    assert last.endswith(f"castalia generate {tmp_path}/run, castalia report {tmp_path}/run")


def test_words_are_left_out_from_the_least():
    names = ("step", "share", "loss", "skipped", "valid", "gnorm", "lr", "tok/s", "mfu")
    words = dict.fromkeys((*names, "mem", "data", "eta"), "x" * 8)
    assert len(fitted(words)) == 78  # eight of them
    # A metric of the loss comes before them, and nothing after the first that does not fit.
    assert fitted(words | {"squared": "y" * 8}).count("x" * 8) == 7
    assert fitted(words | {"squared": "y" * 70}).count("x" * 8) == 4


def test_a_whole_run_without_targets_is_not_done(config_of):
    trainer = run(config_of("train.steps=2", "guard.skip_steps=[1,2]"), command=["castalia"])
    require_training(trainer)  # they were skipped by request
    shorter = run(config_of("train.steps=1", "guard.skip_steps=[1,2]"), command=["castalia"])
    assert closing_line(shorter).startswith("done: step 2, beyond train.steps 1; saved in ")
    trainer.progress.without_targets = 2
    with pytest.raises(TrainingError, match="none of the 2 steps had a target"):
        require_training(trainer)
