"""The learning-rate finder and the coordinate check: short runs, their verdicts and pictures."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from castalia.analysis.tuning.chart import Mark, Panel, Scale, chart, number
from castalia.analysis.tuning.coord_check import (
    LOGITS,
    MUP,
    STANDARD,
    coordinate_check,
    growing,
    slopes,
    table,
    write_picture,
)
from castalia.analysis.tuning.lr_find import find_lr, judged
from castalia.analysis.tuning.short_runs import at_width
from castalia.cli.app import app
from castalia.core.errors import ConfigError
from castalia.distributed import World
from castalia.recipes import load_config
from castalia.runs.named_corpus import ensure_on_all

SMALL = (
    *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("data.seq_length=32", "train.batch_size=4", "optim.lr=1e-2"),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny run whose text is prepared once, outside its folder."""
    folder = tmp_path_factory.mktemp("texts")
    made = load_config(["debug", f"output={folder}", *SMALL])
    world = World.start(made.parallel, "cpu")
    made = ensure_on_all(made, world)
    world.close()
    return made.model_copy(update={"output": str(folder / "run")})


@pytest.fixture(scope="module")
def points(config):
    return coordinate_check(config, [128, 32, 64], 5)


def test_activations_grow_with_the_width_without_mup_alone(points, config, tmp_path):
    """Appendix D.1 of arXiv:2203.03466."""
    ours = {each.part: each for each in slopes(points, MUP)}
    theirs = {each.part: each for each in slopes(points, STANDARD)}
    assert list(ours) == [
        "embed",
        *(f"layers.{i}{part}" for i in (0, 1) for part in (".attn", ".mlp", "")),
        LOGITS,
    ]
    for part, each in ours.items():
        # Drawn at random, the logits of the first step shrink with the root of the width.
        assert abs(each.first) < 0.12 or part == LOGITS
        assert abs(each.last) < 0.25, each
    assert ours[LOGITS].first == pytest.approx(-0.5, abs=0.1)
    for part in ("layers.1", "layers.1.mlp", LOGITS):
        assert abs(theirs[part].first) < 0.12 and theirs[part].last > 0.5
    assert growing(points, MUP) == [] and len(growing(points, STANDARD)) >= 5
    assert len(table(points)) == 8 and len(table(points)[0]) == 5
    file = write_picture(points, tmp_path / "x" / "check.svg")
    drawn = file.read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    # Two rows of four steps, with a line for each part.
    assert drawn.count("<polyline") == 2 * 4 * 8 and "μP, step 5" in drawn
    assert not Path(config.output).exists()


def test_a_width_of_its_own_section_is_kept(config):
    own = config.model.model_copy(update={"intermediate_size": 96, "attention_head_dim": 8})
    wide = at_width(own, 64)
    assert (wide.intermediate_size, wide.attention_head_dim, wide.hidden_size) == (192, 16, 64)
    with pytest.raises(ConfigError, match="name two at least"):
        coordinate_check(config, [32, 32], 2)


def test_the_rate_rises_until_the_loss_breaks_away(config):
    found = find_lr(config, low=1e-4, high=30.0, steps=50)
    assert found.diverged and len(found.rates) < 50
    assert found.rates[0] == 1e-4 and found.rates[1] / found.rates[0] == pytest.approx(
        3e5 ** (1 / 49)
    )
    assert 1e-4 < found.steepest < found.lowest < 3
    assert found.suggestion == pytest.approx(found.lowest / 10, rel=0.05)
    with pytest.raises(ConfigError, match=r"broke away after \d steps"):
        find_lr(config, low=100.0, high=1e5, steps=10)
    with pytest.raises(ConfigError, match="the rates must rise"):
        find_lr(config, low=1.0, high=0.1, steps=10)


def test_the_steepest_descent_and_the_lowest_loss():
    rates = [10.0 ** (n / 4 - 4) for n in range(20)]
    losses = [5.0] * 6 + [4.9, 4.0, 3.0, 2.5, 2.4, 2.3, 2.3, 2.2, 2.1, 2.0, 2.2, 2.6, 3.0, 4.0]
    found = judged(rates, losses, True)
    assert found.lowest == rates[15] and rates[6] <= found.steepest <= rates[8]


def test_the_verbs(config, tmp_path):
    words = ["debug", *SMALL, f"output={tmp_path / 'run'}"]
    runner = CliRunner()
    done = runner.invoke(
        app,
        ["lr-find", *words, "--steps", "10", "--to", "0.01", "--picture", str(tmp_path / "a.svg")],
    )
    assert done.exit_code == 0, done.output
    assert "suggestion: optim.lr=" in done.output and "did not break away" in done.output
    picture = ["--picture", str(tmp_path / "b.svg")]
    done = runner.invoke(
        app, ["coord-check", *words, "--widths", "32,64", "--steps", "2", "--json", *picture]
    )
    assert done.exit_code == 0, done.output
    values = json.loads(done.output[done.output.index("{") :])
    assert len(values["sizes"]) == 2 * 2 * 2 * 8 and set(values["slopes"]) == {MUP, STANDARD}
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "b.svg"}
    for wrong, message in (
        (["--widths", "32,x"], "expected integers"),
        (["--picture", "a.png"], ""),
    ):
        done = runner.invoke(app, ["coord-check", *words, "--steps", "1", *wrong])
        assert done.exit_code and message in str(done.exception)


def test_a_chart_leaves_out_what_its_axes_cannot_show():
    lines = {"a<b": [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0), (10.0, float("nan")), (100.0, 3.0)]}
    drawn = chart([[Panel("t", lines, "x", marks=[Mark(10.0, "here")])]], "A & B")
    root = ElementTree.fromstring(drawn)
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == 2
    assert "a&lt;b" in drawn and "A &amp; B" in drawn and "here" in drawn
    assert [number(x) for x in (1e-5, 0.01, 0.5, 20.0)] == ["1e-5", "0.01", "0.5", "20"]
    assert Scale([1.0, 9.0], False, 0, 1).ticks() == [2.0, 4.0, 6.0, 8.0]
    assert Scale([1e-4, 1.0], True, 0, 1).ticks() == [1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert 1.0 in Scale([0.8, 1.2], True, 0, 1).ticks()
