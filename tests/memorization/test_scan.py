"""Scans of a run: scores against plain greedy decoding, resumption, and what is refused."""

import numpy as np
import pytest

import castalia
from castalia.memorization.job import Options, jobs_of
from castalia.memorization.recall import memorized
from castalia.memorization.scan import scan
from castalia.memorization.table import Scores
from castalia.stream.opening import open_stream

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("memorized") / "run"
    castalia.train("debug", steps=8, output=str(folder))
    return folder


def test_scores_are_those_of_greedy_decoding(run, tmp_path):
    (job,) = jobs_of([str(run)], "all", Options(), tmp_path / "all.parquet")
    summaries = {each.step: each for each in scan(job)}
    assert [summaries[step].rows for step in (0, 1, 2, 4, 8)] == [0, 12, 24, 48, 96]
    table = parquet.read_table(tmp_path / "all.parquet")
    assert table.column_names[:4] == ["step", "row", "index", "prompt"]
    last = table.filter(np.asarray(table["step"]) == 8).to_pydict()
    assert last["index"] == list(range(96)) and last["row"] == [i % 12 for i in range(96)]
    model = castalia.load(run)
    rows = open_stream(str(run)).block(range(96)).tokens
    assert last["score"] == memorized(model, rows).tolist()
    true = -float(model.logprobs(rows[5][:64].tolist())[31:].mean())
    assert last["loss"][5] == pytest.approx(true)
    metadata = Scores(tmp_path / "all.parquet").metadata
    assert metadata["weight_seed"] == 1234 and len(metadata["fingerprint"]) == 16
