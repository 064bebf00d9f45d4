"""Weight statistics: numbers against torch, one table, resumed after a kill; and the page."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.weights.conftest import STEPS, write_revision

from castalia.analysis.weights import write_weights_page
from castalia.cli.app import app
from castalia.core.errors import CheckpointError, ConfigError, DataError
from castalia.weights import statistics, sweep
from castalia.weights.measured import projected
from castalia.weights.table import parts_folder, read_table

NAME = "layers.0.mlp.up.weight"


@pytest.fixture(scope="module")
def table(learning, tmp_path_factory) -> Path:
    """The table of every checkpoint of the run, with spectra."""
    path = tmp_path_factory.mktemp("table") / "weights.parquet"
    measured = sweep.sweep([str(learning)], str(path), spectra=True)
    assert [each.step for each in measured] == STEPS
    return path


def rows_of(path: Path) -> dict[tuple[int, str], dict]:
    """The rows by step and name."""
    return {(row["step"], row["name"]): row for row in read_table(path).to_pylist()}


def test_numbers_of_a_tensor_and_of_a_layer(table, weights):
    rows = rows_of(table)
    row = rows[12, NAME]
    own = weights[12][NAME].double()
    start = weights[0][NAME].double()
    before = weights[10][NAME].double()
    centred = own - own.mean()
    singular = torch.linalg.svdvals(own)
    expected = {
        "elements": own.numel(),
        "l1": own.abs().sum(),
        "l2": own.norm(),
        "mean": own.mean(),
        "variance": own.var(correction=0),
        "median": own.float().median(),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
        "largest": own.abs().max(),
        "from_start": (own - start).norm(),
        "cosine_start": torch.cosine_similarity(own.flatten(), start.flatten(), 0),
        "from_previous": (own - before).norm(),
        "spectral_norm": singular[0],
        "stable_rank": (own.norm() / singular[0]) ** 2,
        "participation": (singular**2).sum() ** 2 / (singular**4).sum(),
        "singular_50": torch.quantile(singular, 0.5),
        "singular_90": torch.quantile(singular, 0.9),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=1e-5, abs=1e-9), name
    assert (row["start"], row["previous"], row["layer"], row["peer"]) == (0, 10, 0, None)
    inside = [t.double().flatten() for name, t in weights[12].items() if "layers.0" in name]
    layer = rows[12, "layer 0"]
    assert layer["l2"] == pytest.approx(float(torch.cat(inside).norm()))
    assert layer["kurtosis"] == pytest.approx(kurtosis(torch.cat(inside)))
    # The rate of the first update was 0.
    assert rows[1, "model"]["from_start"] == 0
    assert rows[2, "model"]["from_start"] > 0


def kurtosis(values: torch.Tensor) -> float:
    """The fourth central moment over the squared variance."""
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


def test_large_tensors_are_read_in_blocks(monkeypatch):
    tensor = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    whole = statistics.sums_of(tensor).statistics()
    monkeypatch.setattr(statistics, "BLOCK", 10)
    assert statistics.sums_of(tensor).statistics() == pytest.approx(whole)
    assert statistics.between(tensor, 2 * tensor).cosine == pytest.approx(1.0)
    assert statistics.sums_of(torch.ones(4)).statistics()["kurtosis"] is None


def test_a_diverged_tensor_has_numbers_that_say_so():
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensor[1, 2] = math.nan
    values = statistics.sums_of(tensor).statistics() | statistics.spectrum(tensor)
    for name in ("l2", "largest", "spectral_norm", "singular_50"):
        assert math.isnan(values[name]), name
    finite = statistics.spectrum(tensor.nan_to_num())
    assert list(values)[-len(finite) :] == list(finite) == list(statistics.SPECTRUM)


def test_the_spectrum_of_experts_is_the_mean_of_theirs() -> None:
    """And not that of one matrix with a row for each."""
    stack = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    values = sweep.own_values(stack, spectra=True)
    norms = torch.linalg.matrix_norm(stack.double(), 2)
    assert values["spectral_norm"] == pytest.approx(float(norms.mean()))
    assert sweep.own_values(stack, spectra=False).keys() == {"median"}


def test_distances_from_sketches_have_the_error_that_theory_gives():
    generator = torch.Generator().manual_seed(0)
    for count, error in ((1, 0.091), (8, 0.032)):
        ratios = []
        for _ in range(200):
            tensors = torch.randn(count, 40, 64, generator=generator)
            squares = sum(np.square(projected(tensor)[0]).sum() for tensor in tensors)
            ratios.append(squares**0.5 / float(tensors.double().norm()))
        # sqrt(2 / 61) / 2 of a distance in one tensor, less by sqrt(count) in equal ones.
        assert np.std(ratios) == pytest.approx(error, rel=0.2)
        assert np.mean(ratios) == pytest.approx(1, abs=0.02)
        assert np.abs(np.array(ratios) - 1).max() < 5 * error


def test_two_seeds_and_a_stop_between_checkpoints(published, weights, tmp_path, monkeypatch):
    for name, factor in (("seed0", 1.0), ("seed1", -1.0)):
        for step in (0, 2, 4):
            tensors = {each: factor * tensor for each, tensor in weights[step].items()}
            write_revision(tmp_path / "suite" / name / f"step{step}", tensors)
    path = tmp_path / "drift.parquet"
    paths = [str(tmp_path / "suite" / name) for name in ("seed0", "seed1")]
    opened = {
        f"{tmp_path}/suite/{name}/step{step}": {n: f * t for n, t in weights[step].items()}
        for name, f in (("seed0", 1.0), ("seed1", -1.0))
        for step in (0, 2, 4)
    }
    # The toy folders have a config.json of no architecture: their tensors are given.
    monkeypatch.setattr(sweep, "opened", lambda each: Tensors(opened[each.path]))
    original = sweep.write_part

    def stop(output, identity, rows):
        if len(list(parts_folder(output).glob("*.parquet"))) == 4:
            raise KeyboardInterrupt
        original(output, identity, rows)

    monkeypatch.setattr(sweep, "write_part", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(paths, str(path))
    assert not path.exists()
    monkeypatch.setattr(sweep, "write_part", original)
    assert len(sweep.sweep(paths, str(path))) == 2
    assert not parts_folder(path).exists()
    assert sweep.sweep(paths, str(path)) == []
    rows = read_table(path).to_pylist()
    assert len({(r["model"], r["step"], r["level"], r["name"]) for r in rows}) == len(rows)
    (drift,) = [r for r in rows if (r["model"], r["step"], r["name"]) == ("seed1", 4, "matrices")]
    assert drift["peer"] == "seed0"
    assert drift["peer_cosine"] == pytest.approx(-1)
    assert drift["peer_distance"] == pytest.approx(2 * drift["l2"])
    page = write_weights_page(path, tmp_path / "page.html").read_text()
    del opened[f"{tmp_path}/suite/seed0/step0"][NAME]
    with pytest.raises(CheckpointError, match=rf"step2 has {NAME} .*step0 lacks it, so the two do"):
        sweep.sweep(paths, str(tmp_path / "x.parquet"), steps="2")
    assert "Between models" in page and "seed1 / seed0" in page


class Tensors(dict):
    """Tensors in memory, as if they were stored."""

    def stored(self, name: str) -> torch.Tensor:
        """One of them."""
        return self[name]


def test_the_command_and_bad_input(learning, table, tmp_path, capsys):
    page = tmp_path / "w.html"
    words = [str(learning), "--steps", "0,4,8", "--output", str(tmp_path / "w.parquet")]
    app(["weights", *words, "--page", str(page), "--json"], standalone_mode=False)
    answer = json.loads(capsys.readouterr().out)
    assert [each["step"] for each in answer["measured"]] == [0, 4, 8]
    charts = re.findall(r'font-size="12" fill="#333">([^<]*)<', page.read_text())
    assert charts[:2] == ["L2 norm", "distance from the first checkpoint"]
    assert "stable rank, mean of matrices" not in charts
    assert write_weights_page(table, page).read_text().count("stable rank, mean of matrices") == 1
    with pytest.raises(ConfigError, match=r"FILE\.parquet"):
        sweep.sweep([str(learning)], "weights.csv")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        sweep.sweep([str(learning)], str(tmp_path / "x.parquet"), steps="3")
    other = tmp_path / "other.parquet"
    other.write_text("not a table")
    with pytest.raises(DataError, match="cannot be read"):
        sweep.sweep([str(learning)], str(other))
