"""Rows that grow with the steps: the lengths, and a run that has them."""

import json
import math

import pytest

from castalia.core.errors import ConfigError
from castalia.data.curriculum import Curriculum, CurriculumConfig
from castalia.recipes import load_config
from castalia.runs.rows import rows_of_run
from castalia.stream import viewing

LINES = (
    "curriculum.kind=linear",
    "curriculum.shortest=4",
    "curriculum.length_step=4",
    "schedule.decay_steps=4",
)


def test_lengths_are_those_of_deepspeed():
    """Its formula, written out: floor((t / T) ** (1 / degree) * (max - min) + min), rounded down to
    a multiple, at most max."""
    for kind, degree in (("linear", 1), ("root", 2), ("root", 3)):
        config = CurriculumConfig(
            kind=kind, shortest=64, longest=1024, steps=1000, length_step=8, root_degree=degree
        )
        curriculum = Curriculum(config, seq_length=2048, steps=5000)
        for step in (1, 2, 17, 250, 500, 999, 1000, 1001, 4000):
            whole = math.floor((step / 1000) ** (1 / degree) * (1024 - 64) + 64)
            assert curriculum.length(step) == min(whole - whole % 8, 1024)
    assert curriculum.length(1) == 160 - 160 % 8  # the cube root of 1/1000 is 1/10
    stages = CurriculumConfig(kind="discrete", lengths=[8, 16, 64], until=[5, 10])
    found = [Curriculum(stages, 32, 20).length(step) for step in (1, 5, 6, 10, 11, 20)]
    assert found == [8, 8, 16, 16, 32, 32]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_shortened_and_their_order_stays(train, tmp_path):
    whole = tmp_path / "whole"
    train(whole, "train.steps=4", "schedule.decay_steps=4")
    grown = tmp_path / "grown"
    # Broken off in the middle: the length is a function of the step, so a resume goes on with it.
    train(grown, *LINES, "curriculum.steps=4", "train.steps=2")
    train(grown, *LINES, "curriculum.steps=4", "train.steps=4")
    straight = tmp_path / "straight"
    train(straight, *LINES, "train.steps=4")
    lines = metrics(grown)
    assert [line["seq_length"] for line in lines] == [4, 8, 12, 16]
    assert [line["tokens"] for line in lines] == [12 * 4, 12 * 12, 12 * 24, 12 * 40]
    assert [line["rows_hash"] for line in lines] == [line["rows_hash"] for line in metrics(whole)]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(straight)]
    assert metrics(straight)[-1]["seq_length"] == 16


def test_a_ramp_takes_the_same_rows_in_smaller_batches(train, tmp_path):
    options = ("schedule.decay_steps=4", "train.eval_every=2", "data.split='8,2,0'")
    whole = tmp_path / "whole"
    train(whole, "train.steps=2", *options)
    ramped = tmp_path / "ramped"
    # 4, 4 and 8 rows, then 12: broken off within the ramp and resumed.
    words = ("train.batch_ramp=[4,4,16]", *options)
    train(ramped, *words, "train.steps=2")
    train(ramped, *words, "train.steps=4")
    lines = metrics(ramped)
    assert [line["tokens"] // 16 for line in lines] == [4, 8, 16, 28]
    # The order depends on the rows of a whole run; these two take 24 and 28, of one pass.
    viewed = [step_hash(ramped, step) for step in range(4)]
    assert [line["rows_hash"] for line in lines] == viewed
    assert lines[1]["valid_loss"] != lines[3]["valid_loss"]


def step_hash(folder, step):
    config = load_config([folder])
    return viewing.step_hash(rows_of_run(config).train, step, config.train.batches)


def test_lengths_that_do_not_fit_are_refused():
    debug = ["debug", "data.seq_length=64", "curriculum.kind=linear"]
    for words, message in (
        (["train.batch_ramp=[4,3,9]", "train.batch_size=12"], "8 is not divisible by 3"),
        (["train.batch_ramp=[4,4,9]", "mixing.kind=exp3"], "plans batches of one size"),
        (["train.batch_ramp=[4,4,9]", "train.epochs=1"], "train.epochs counts full batches"),
        (["curriculum.shortest=96"], "longer than data.seq_length 64"),
        (["curriculum.shortest=12", "parallel.tp=8"], "length 16.*|not divisible by"),
        (["curriculum.shortest=4"], "rounds down to 0 tokens"),
        (["curriculum.lengths=[8]"], "belong to kind discrete"),
        (["loss.kind=orpo", "data.pairs=a", "data.packing=unpacked"], "needs whole answers"),
        (["curriculum.kind=discrete", "curriculum.lengths=[8,16]"], "last step of each stage"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([*debug, *words])
