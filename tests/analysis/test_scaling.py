"""Scaling laws: known numbers are recovered, the minimum is scipy's, intervals cover the truth, and
what the points do not determine is said."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fixtures.browser import Visit, drawn
from typer.testing import CliRunner

from castalia.analysis import write_report
from castalia.analysis.runs import read_runs
from castalia.analysis.scaling import Point, Points, ScalingFit, fit_scaling, read_points
from castalia.analysis.scaling.bootstrap import draw_replicates
from castalia.analysis.scaling.part import scaling_part
from castalia.analysis.scaling.points import parse_number
from castalia.analysis.scaling.solve import Problem, fit_law, huber
from castalia.cli.app import app
from castalia.core.errors import CastaliaError, DataError
from castalia.models.families import build_model_config
from castalia.models.flops import parameter_counts

TRUTH = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
"""Hoffmann et al. 2022, appendix D.3."""
SIZES = (7e7, 1.6e8, 4.1e8, 1e9, 2.8e9)
TOKENS = (5e9, 2e10, 8e10, 3e11)


SUITES = 16


def true_loss(parameters: float, tokens: float) -> float:
    """The law with the numbers of TRUTH."""
    law = TRUTH
    return law["E"] + law["A"] / parameters ** law["alpha"] + law["B"] / tokens ** law["beta"]


def suite(
    sizes: Sequence[float] = SIZES,
    tokens: Sequence[float] = TOKENS,
    noise: float = 0.0,
    seed: int = 0,
) -> Points:
    """A run for each size and number of tokens."""
    generator = np.random.default_rng(seed)
    points = []
    for size in sizes:
        for count in tokens:
            loss = true_loss(size, count) * float(np.exp(noise * generator.standard_normal()))
            points.append(Point(f"{size:g}", f"{size:g}/{count:g}", size, count, loss))
    return Points(points, "loss")


def write_csv(path: Path, points: Points) -> Path:
    """The points as a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "parameters", "tokens", "loss"])
        writer.writerows([p.model, p.parameters, p.tokens, p.loss] for p in points.points)
    return path


def run_verb(*words: str) -> str:
    """Output of `castalia scaling WORDS`."""
    done = CliRunner().invoke(app, ["scaling", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture(scope="module")
def noisy() -> ScalingFit:
    """A fit to noisy points, of which the largest size is held out."""
    return fit_scaling(suite(noise=3e-3, seed=3), hold_out=["largest"], bootstrap=100)


def test_exact_points_give_the_numbers_back():
    fit = fit_scaling(suite(), bootstrap=20)
    for name, value in TRUTH.items():
        assert float(fit.law.number(name)) == pytest.approx(value, rel=1e-8), name
        assert fit.intervals[name] == pytest.approx((value, value), rel=1e-6)
    assert np.abs(fit.residuals).max() < 1e-10 and fit.notes == []
    # One variable alone: the other term is a part of E.
    for sizes, tokens, names in (
        (SIZES, TOKENS[:1], ("A", "alpha")),
        (SIZES[:1], TOKENS, ("B", "beta")),
    ):
        fit = fit_scaling(suite(sizes, tokens), bootstrap=0)
        assert fit.law.names == ["E", *names]
        for name in names:
            assert float(fit.law.number(name)) == pytest.approx(TRUTH[name], rel=1e-7)
        (note,) = fit.notes
        assert "is part of E: every point has the same" in note
    floor = TRUTH["E"] + TRUTH["A"] / SIZES[0] ** TRUTH["alpha"]
    assert float(fit.law.number("E")) == pytest.approx(floor, rel=1e-8)


def test_the_minimum_is_that_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    points = suite(noise=1e-2, seed=5).points
    logs = [np.log([p.parameters for p in points]), np.log([p.tokens for p in points])]
    losses = np.array([p.loss for p in points])
    law, value, _ = fit_law(Problem(("parameters", "tokens"), logs, losses))

    def objective(numbers: np.ndarray) -> float:
        """As the paper writes it, without our centering."""
        e, a, alpha, b, beta = numbers
        first = np.logaddexp(a - alpha * logs[0], b - beta * logs[1])
        return float(huber(np.logaddexp(first, e) - np.log(losses)).sum())

    assert objective(law.numbers) == pytest.approx(value, rel=1e-9)
    found = [
        optimize.minimize(objective, start, method="BFGS").fun
        for start in ([0.5, 5, 0.3, 5, 0.3], [0, 10, 0.5, 10, 0.5], law.numbers * 1.01)
    ]
    polished = optimize.minimize(objective, law.numbers, method="Nelder-Mead").fun
    # scipy finds nothing lower from its starts, and no way down from the minimum.
    assert value <= min(found) * (1 + 1e-6)
    assert polished == pytest.approx(value, rel=1e-6)


def test_intervals_cover_the_truth():
    covered = dict.fromkeys(("alpha", "prediction"), 0)
    widths = []
    sizes = np.geomspace(1e7, 3e9, 12).tolist()
    truth = true_loss(1e9, 3e11)
    for seed in range(SUITES):
        fit = fit_scaling(suite(sizes, [3e11], noise=5e-3, seed=seed), bootstrap=40)
        low, high = fit.intervals["alpha"]
        widths.append(high - low)
        covered["alpha"] += low <= TRUTH["alpha"] <= high
        prediction = fit.predict(1e9, None)
        covered["prediction"] += prediction.low <= truth <= prediction.high
    # At a coverage of 95% the chance of 12 or fewer of 16 is below 1 in 100; over 150 suites and
    # 200 replicates it was 98%.
    assert covered["alpha"] > 12 and covered["prediction"] > 12
    assert np.median(widths) < 0.15  # nor are they too wide to say anything


def test_the_largest_size_is_predicted_from_the_others(noisy: ScalingFit):
    assert {point.model for point in noisy.held_out} == {"2.8e+09"}
    assert len(noisy.points) == 16 and len(noisy.held_out) == 4
    values = noisy.data()
    for row in values["held_out"]:
        assert abs(row["residual"]) < 0.01
        assert row["low"] <= row["fitted"] <= row["high"]
    for row in values["points"]:
        assert row["loss"] == pytest.approx(row["fitted"] * (1 + row["residual"]), rel=1e-6)
    low, high = noisy.intervals["alpha"]
    assert low < TRUTH["alpha"] < high and high - low < 0.5
    prediction = noisy.predict(1.2e10, 3e11)
    assert prediction.beyond == pytest.approx(12)
    assert prediction.low < true_loss(1.2e10, 3e11) < prediction.high
    curves = {curve["name"]: curve for curve in values["curves"]}
    assert list(curves) == ["70M", "160M", "410M", "1G", "2.8G"]
    expected = noisy.law.loss(np.array([7e7]), np.array(curves["70M"]["tokens"][:1]))
    assert curves["70M"]["loss"][0] == pytest.approx(float(expected[0]))
    json.dumps(values, allow_nan=False)


def test_the_frontier_is_the_lowest_loss_of_a_budget(noisy: ScalingFit):
    optimum = noisy.optimum(np.array([1e21, 1e23]))
    for place, compute in enumerate((1e21, 1e23)):
        sizes = np.geomspace(1e8, 1e12, 20001)
        losses = noisy.law.loss(sizes, compute / 6 / sizes)
        assert optimum.parameters[place] == pytest.approx(sizes[losses.argmin()], rel=1e-3)
        assert optimum.loss[place] == pytest.approx(losses.min(), rel=1e-9)
        assert 6 * optimum.parameters[place] * optimum.tokens[place] == pytest.approx(compute)
    slope = np.log(optimum.parameters[1] / optimum.parameters[0]) / np.log(100)
    assert optimum.exponent == pytest.approx(slope)
    assert optimum.exponent_interval[0] < slope < optimum.exponent_interval[1]


def test_the_bootstrap_draws_runs():
    points = [Point("a", f"run {i // 3}", 10.0**i, 1e9 * 2**i, 2.0) for i in range(30)]
    weights, refused = draw_replicates(points, ("parameters",), 50, seed=1)
    assert weights.shape == (50, 30) and (weights.sum(axis=1) == 30).all() and refused == 0
    # The three points of a run are in or out together.
    assert (weights.reshape(50, 10, 3).std(axis=2) == 0).all()
    assert (weights == draw_replicates(points, ("parameters",), 50, seed=1)[0]).all()
    assert (weights != draw_replicates(points, ("parameters",), 50, seed=2)[0]).any()


@pytest.mark.parametrize(
    ("points", "law", "problem"),
    [
        (suite(SIZES[:2]), "auto", r"A/N\^alpha needs at least 3 model sizes, got 2: 70M \(7e"),
        (suite(tokens=TOKENS[:2]), "auto", r"needs at least 3 numbers of tokens, got 2: 5G"),
        (suite(SIZES[:1], TOKENS[:1]), "auto", "needs at least 3 model sizes, got 1"),
        (suite(SIZES, TOKENS[:1]), "both", "needs at least 3 numbers of tokens, got 1"),
        (suite(SIZES[:3], TOKENS[:1]), "auto", r"3 numbers to fit and needs at least 4 points"),
        (Points([], "loss"), "auto", "got 0: no points"),
        (Points([Point("a", "a", 1e6, 1e9, float("nan"))], "loss"), "auto", "loss of a is nan"),
        (Points([Point("a", "a", 1e6, 0.0, 2.0)], "loss"), "auto", "tokens of a is 0"),
        (Points([Point("a", "a", 1e6, 1e9, -2.0)], "loss"), "auto", "loss of a is -2; .* above 0"),
        (suite(), "N", "law 'N': expected auto, both, parameters, tokens"),
    ],
)
def test_points_that_hold_no_law_are_refused(points: Points, law: str, problem: str):
    with pytest.raises(CastaliaError, match=problem):
        fit_scaling(points, law=law, bootstrap=0)


def test_what_the_points_do_not_determine_is_said():
    def notes(points: list[Point], **options: Any) -> str:
        return " ".join(fit_scaling(Points(points, "loss"), **options).notes)

    flat = [Point("", str(i), 1e7 * 2**i, 1e9, 2.0) for i in range(6)]
    assert "A and alpha are not identified" in notes(flat, bootstrap=0)
    rising = [Point("", str(i), 1e7 * 2**i, 1e9, 2.0 + 0.1 * i) for i in range(6)]
    assert "the loss does not fall with N" in notes(rising, bootstrap=0)
    line = [Point("", str(i), 1e7 * 2**i, 1e9, 8.0 * 0.9**i) for i in range(6)]
    assert "the points show no floor" in notes(line, bootstrap=0)
    cliff = [Point("", str(i), 1e7 * 2**i, 1e9, 3.0 if i == 0 else 2.0) for i in range(6)]
    assert "above the grid of starts" in notes(cliff, bootstrap=0)
    ratio = [Point("", f"{n:g}", n, 20 * n, true_loss(n, 20 * n)) for n in (*SIZES, 3e10)]
    assert "the terms of N and D can hardly be told apart" in notes(ratio, bootstrap=0)
    close = suite([3e8, 5e8, 1e9, 1.2e9, 1.5e9, 2e9], [3e11], noise=1e-2).points
    text = notes(close, bootstrap=40)
    assert "a bootstrap over 6 runs sees few of them" in text
    assert "alpha is hardly identified: its interval goes from" in text
    four = [*suite(SIZES[:3], [3e11], noise=1e-2).points, Point("", "again", 7e7, 3e11, 2.9)]
    assert "had too few sizes for the law and were drawn again" in notes(four, bootstrap=40)
    one = [point._replace(run="one") for point in suite(tokens=TOKENS[:1]).points]
    assert "No intervals: the points are of 1 runs" in notes(one, bootstrap=40)
    assert "leaves tokens out, although they differ from 5G to 300G" in notes(
        suite().points, law="parameters", bootstrap=0
    )


def test_the_verb_prints_the_law_and_its_residuals(tmp_path: Path):
    points = suite(noise=3e-3, seed=3)
    path = str(write_csv(tmp_path / "points.csv", points))
    words = [path, "--predict", "12B:300B", "--compute", "1e22", "--hold-out", "2.8e+09"]
    text = run_verb(*words, "--bootstrap", "20")
    fit = fit_scaling(points, hold_out=["2.8e+09"], bootstrap=20)
    lines = text.splitlines()
    assert lines[0] == "loss = E + A/N^alpha + B/D^beta"
    assert any(line.split()[:2] == ["alpha", f"{fit.law.number('alpha'):.4g}"] for line in lines)
    residual = f"{fit.residuals[0]:+.2%}"
    assert any(line.split()[:3] == ["7e+07:2", "70M", "5G"] and residual in line for line in lines)
    assert f"{fit.predict(1.2e10, 3e11).loss:.4f}" in text and "12x" in text
    assert "Held out" in text and "Compute-optimal: N ~ C^0." in text
    values = json.loads(run_verb(*words, "--bootstrap", "0", "--json"))
    assert values["numbers"]["E"]["value"] == pytest.approx(float(fit.law.number("E")))
    assert values["numbers"]["E"]["low"] is None and len(values["points"]) == 16
    assert values["predictions"][0]["loss"] == pytest.approx(fit.predict(1.2e10, 3e11).loss)
    (size,) = values["frontier"]["parameters"]
    assert size == pytest.approx(float(fit.optimum(np.array([1e22])).parameters[0]))


def test_numbers_and_places_are_read_as_people_write_them(tmp_path: Path):
    assert [parse_number(text, "") for text in ("1.4B", "70m", "3e11", "2,000k")] == [
        1.4e9,
        7e7,
        3e11,
        2e6,
    ]
    path = write_csv(tmp_path / "p.csv", suite(tokens=TOKENS[:1]))
    text = run_verb(str(path), "--predict", "12B", "--predict", "12B:5G", "--bootstrap", "0")
    assert text.count("12G") == 2
    for words, problem in (
        (["--predict", "12B:9T"], "every point has 5G tokens, so that the law says nothing"),
        (["--predict", ":5G"], "needs the parameters; write N:D"),
        (["--predict", "x:1"], "--predict x:1: expected a number above 0 such as 1.4B"),
        (["--predict", ":"], "expected N:D such as 1.4B:300B"),
        (["--compute", "0"], "--compute 0: expected a number above 0"),
        (["--hold-out", "2.8e09"], r"no such model; did you mean '2\.8e\+09'\?; have 1"),
        (["--no-embeddings"], "only the configs of runs say which parameters"),
        (["--from-step", "5"], "every row of a CSV file is a point"),
        (["--where", "shots = 0"], "and none is read"),
        (["--metric", "los"], "lacks the column 'los'; did you mean 'loss'"),
        ([str(tmp_path)], "CSV files and others; fit each kind alone"),
    ):
        with pytest.raises(CastaliaError, match=problem):
            run_verb(str(path), *words)
    path.write_text("parameters,tokens,loss\n1M,2B,three\n")
    with pytest.raises(DataError, match=r"p\.csv line 2, loss: expected a number .* got 'three'"):
        read_points([path])
    with pytest.raises(DataError, match="does not exist"):
        read_points([tmp_path / "gone.csv"])


WIDTHS = (8, 16, 24, 32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of four sizes and one length, whose validation loss follows the law."""
    folder = tmp_path_factory.mktemp("suite")
    for width in WIDTHS:
        run = folder / f"w{width}"
        run.mkdir()
        model = {"family": "neox", "num_layers": 1, "hidden_size": width, "vocab_size": 100}
        model |= {"num_attention_heads": 1}
        config = {"model": model, "data": {"seq_length": 4}, "train": {"steps": 60}}
        (run / "config.yaml").write_text(json.dumps(config))
        lines = []
        for step in range(1, 61):
            line = {"step": step, "tokens": 640 * step, "loss": 9.0 / step + 5 + 40 / width}
            if step % 20 == 0:
                line["valid_loss"] = 5 + 60 / width + 1 / step
            lines.append(line)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_give_their_loss_at_the_end(runs: Path):
    source = read_points([runs])
    names = [f"w{width}" for width in WIDTHS]
    assert source.metric == "validation loss, nats per token"
    assert sorted(point.run for point in source.points) == sorted(names)
    for point in source.points:
        width = int(point.run[1:])
        values = json.loads((runs / point.run / "config.yaml").read_text())
        counts = parameter_counts(build_model_config(values["model"], "here"))
        assert point.loss == 5 + 60 / width + 1 / 60 and point.tokens == 640 * 60
        assert point.parameters == counts.total and point.step == 60
        bare = read_points([runs / point.run], embeddings=False).points[0]
        assert bare.parameters == counts.non_embedding
    training = read_points([runs], "train_loss").points[0]
    assert training.loss == pytest.approx(9 / 60 + 5 + 40 / int(training.run[1:]), abs=2e-3)
    way = read_points([runs], from_step=30)
    assert [p.step for p in way.points if p.run == "w8"] == [40, 60]
    assert "The learning rate has not decayed there" in way.notes[0]
    way = read_points([runs], "train_loss", from_step=30)
    steps = [p.step for p in way.points if p.run == "w8"]
    assert steps[-1] == 60 and 6 < len(steps) <= 12 and min(steps) >= 30
    with pytest.raises(DataError, match="have no results table; evaluate them"):
        read_points([runs], "bits_per_byte")


def test_an_unfinished_run_is_left_out(runs: Path, tmp_path: Path):
    other = tmp_path / "w8"
    other.mkdir()
    lines = (runs / "w8" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:30]))
    config = json.loads((runs / "w8" / "config.yaml").read_text())
    (other / "config.yaml").write_text(json.dumps(config))
    source = read_points([runs, other])
    assert len(source.points) == 4 and "(step 30 of 60)" in source.notes[0]
    with pytest.raises(DataError, match=r"no finished run: .* wait, or give --from-step"):
        read_points([other])
    config["train"]["steps"] = 30
    config["model"]["vocab_size"] = 200
    (other / "config.yaml").write_text(json.dumps(config))
    notes = " ".join(read_points([runs, other]).notes)
    assert "no validation at the end of" in notes and "The vocabularies of the runs differ" in notes
    (other / "config.yaml").unlink()
    with pytest.raises(DataError, match="does not say the size of the model"):
        read_points([other])


def test_a_results_table_gives_its_last_steps(tmp_path: Path):
    pytest.importorskip("duckdb")
    from castalia.results import Result, ResultsStore

    rows = []
    for place, size in enumerate((10**7, 10**8, 10**9, 10**10)):
        for step in (0, 500, 1000):
            row = Result("s", f"m{place}", "lambada", "acc", 0.2 * place + step / 1e4, step=step)
            row = row._replace(parameters=size, tokens=step * 2048, last_step=1000, shots=0)
            row = row._replace(higher_is_better=True, seed=place)
            rows += [row, row._replace(metric="perplexity", value=9.0, higher_is_better=False)]
    store = ResultsStore(tmp_path / "evals")
    store.add(rows)
    source = read_points([store.folder], "acc")
    assert source.metric == "1 - lambada/acc"
    for place, point in enumerate(source.points):
        assert point[:4] == (f"m{place}", f"m{place}", 10 ** (7 + place), 2048e3)
        assert point.loss == pytest.approx(0.9 - 0.2 * place) and point.step == 1000
    # The folder above, whose table is in evals/.
    points = source.points
    assert read_points([tmp_path], "lambada/acc").points == points
    assert "2 rows without" not in " ".join(source.notes) and "4 rows without" in source.notes[0]
    assert len(read_points([store.path], "acc", from_step=500).points) == 8
    with pytest.raises(
        DataError, match="no such number in the results; did you mean 'lambada/acc'"
    ):
        read_points([tmp_path], "lambada/ac")
    with pytest.raises(
        DataError, match=r"several numbers have this name; .* lambada/acc, lambada/p"
    ):
        read_points([tmp_path], "lambada")
    with pytest.raises(DataError, match=r"no model was evaluated at its last step: m0, m1"):
        read_points([tmp_path], "acc", where="step = 500")
    # Of one model with two seeds, each is a run; without tokens the law of the sizes is left.
    other = ResultsStore(tmp_path / "other")
    last = [row for row in rows if row.step == 1000 and row.metric == "acc"]
    other.add([row._replace(tokens=None, seed=seed) for row in last for seed in (1, 2)])
    source = read_points([other.path], "acc")
    assert [point.run for point in source.points[:2]] == ["m0 seed 1", "m0 seed 2"]
    fit = fit_scaling(source, hold_out=["m0"], law="parameters", bootstrap=0)
    assert "the tokens of the points are unknown" in fit.notes[0] and len(fit.held_out) == 2
    assert fit.data()["points"][0]["tokens"] is None
    assert fit.predict(1e11, 1e9).loss == fit.predict(1e11, None).loss
    store.add([row._replace(shots=5) for row in rows])
    with pytest.raises(DataError, match=r"differ in shots \([05], [05]\); choose with --where"):
        read_points([tmp_path], "acc")
    assert read_points([tmp_path], "acc", where="shots = 0").points == points
    with pytest.raises(DataError, match="not in"):
        store.add([row._replace(value=7.0, shots=9) for row in rows])
        read_points([tmp_path], "acc", where="shots = 9")


def test_the_report_of_a_suite_has_its_law(runs: Path):
    files = read_runs(sorted(runs.iterdir()))
    part = scaling_part(files)
    fit = fit_scaling(read_points([runs]), bootstrap=100)
    assert part.data is not None
    assert part.data["numbers"]["E"]["value"] == pytest.approx(float(fit.law.number("E")))
    assert part.data["points"] == fit.data()["points"]
    for text in ("Scaling law", "loss = E + A/N^alpha", "validation loss", "is part of E", "w32"):
        assert text in part.html
    # Three runs are no suite, and runs of one size and length compare something else.
    assert scaling_part(files[:3]) == ("", None)
    assert scaling_part([*files[:1] * 4]) == ("", None)
    config = files[0].config
    files[0].config = config | {"train": {"steps": 90}}
    html, data = scaling_part(files)
    assert data is None and "No law was fitted" in html and "at least 4 points, got 3" in html


def test_a_browser_draws_the_law(runs: Path, tmp_path: Path, visit: Visit):
    page = visit(write_report([runs], tmp_path / "page.html").as_uri())
    drawn(page)
    chart = page.locator("#scaling")
    assert chart.get_attribute("aria-label") == "loss = E + A/N^alpha and 4 runs"
    assert chart.locator(".point").count() == 4 and chart.locator(".js-line").count() >= 1
