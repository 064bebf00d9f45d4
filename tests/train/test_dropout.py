"""Dropout in the loop: a resume and another micro-batch draw the same, validation draws nothing."""

import pytest

OPTIONS = ("model.hidden_dropout=0.2", "model.attention_dropout=0.1", "train.steps=4")


def losses(lines):
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory, read_lines):
    """Four steps without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output, *OPTIONS)
    return read_lines(output)


def test_a_resume_draws_what_the_whole_run_draws(train, whole, tmp_path, read_lines):
    output = tmp_path / "run"
    train(output, *OPTIONS, "train.steps=2")
    train(output, *OPTIONS)
    lines = read_lines(output)
    assert losses(lines) == losses(whole)
    assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in whole]


def test_micro_batches_draw_alike_and_other_seeds_do_not(train, whole, tmp_path, read_lines):
    split = tmp_path / "split"
    train(split, *OPTIONS, "train.micro_batch_size=4", "train.recompute=true")
    assert losses(read_lines(split)) == pytest.approx(losses(whole), abs=1e-5)
    # With a learning rate of nothing the loss of the same rows differs by what is dropped alone.
    still = ("optim.lr=1e-12", "data.split='50,50,0'", "train.eval_every=1", "train.steps=2")
    dropped = tmp_path / "dropped"
    plain = tmp_path / "plain"
    train(dropped, *OPTIONS, *still)
    train(plain, *still)
    ours = read_lines(dropped)
    theirs = read_lines(plain)
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) > 1e-4
        assert a["valid_loss"] == pytest.approx(b["valid_loss"], abs=1e-6)
