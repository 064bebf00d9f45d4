"""Experts in the loop: a resume and another micro-batch route the same tokens to the same experts,
biases follow the load, and validations are not counted."""

import pytest

OPTIONS = (
    *("model.num_layers=3", "model.moe.experts=4", "model.moe.top_k=1", "model.moe.interval=2"),
    *("model.moe.bias_rate=0.02", "model.moe.z_loss=0.001", "model.moe.jitter=0.05"),
    *("model.moe.capacity_factor=1.25", "model.moe.shared_size=8", "train.steps=4"),
    *("data.split='50,50,0'", "train.eval_every=1"),
)


def routing(lines):
    return [{key: line[key] for key in line if key.startswith("moe/")} for line in lines]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory, read_lines):
    """Four steps without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output, *OPTIONS)
    return read_lines(output)


def test_every_assignment_of_training_is_counted_once(whole):
    for line in whole:
        layers = line["moe/layers"]
        assert [layer["layer"] for layer in layers] == [0, 2]
        for layer in layers:
            # 12 rows of 16 tokens: a recomputation or a validation would add others.
            counts = [share * 12 * 16 for share in layer["load"]]
            assert sum(counts) == pytest.approx(12 * 16, abs=1e-9)
            assert [round(count) for count in counts] == pytest.approx(counts, abs=1e-9)
        worst = max(4 * max(layer["load"]) for layer in layers)
        assert line["moe/load_max"] == pytest.approx(worst)
        # A row of 16 tokens has room for 5 at each of 4 experts.
        assert 0 < line["moe/dropped"] < 1
        assert 0 < line["moe/entropy"] < 1.3863
        assert 0.9 < line["moe/aux_loss"] < 4
        assert line["moe/z_loss"] > 0


def test_a_resume_routes_as_the_whole_run(train, whole, tmp_path, read_lines):
    output = tmp_path / "run"
    train(output, *OPTIONS, "train.steps=2")
    train(output, *OPTIONS)
    lines = read_lines(output)
    # Also the biases: they moved in the first two steps.
    assert routing(lines) == routing(whole)
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in whole]


def test_micro_batches_and_recompute_route_alike(train, whole, tmp_path, read_lines):
    output = tmp_path / "run"
    train(output, *OPTIONS, "train.micro_batch_size=3", "train.recompute=true")
    lines = read_lines(output)
    for ours, theirs in zip(lines, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["moe/aux_loss"] == pytest.approx(theirs["moe/aux_loss"], rel=1e-5)
        for mine, other in zip(ours["moe/layers"], theirs["moe/layers"], strict=True):
            assert mine["load"] == other["load"]
            assert mine["dropped"] == other["dropped"]
