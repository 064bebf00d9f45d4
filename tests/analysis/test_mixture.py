"""The report of a mixed run: every picture and the table, for few sources and for many."""

import re
from pathlib import Path

import numpy as np
import pytest

from castalia.analysis import write_report
from castalia.analysis.areas import columns
from castalia.analysis.mixture import epochs, losses, mixture_section, rows
from castalia.mixing import MixtureLog, Planner, Stats, make_mixer, read_mixture


def record(folder: Path, count: int, steps: int = 30) -> Path:
    """A run's folder with a record over `count` sources whose losses are 2.0, 2.1, ..."""
    names = [f"s<{i}>" for i in range(count)]
    planner = Planner(
        make_mixer("odm", sources=names, eps=0.1 / count),
        sizes=np.arange(count) * 10 + 8,
        rows=8 * count,
        seed=1,
    )
    log = MixtureLog(folder / "mixture.jsonl", planner)
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        stats = Stats(step, (2 + 0.1 * np.arange(count)) * plan.counts, plan.counts)
        planner.observe(stats)
        log.write(plan, stats)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n')
    return folder


@pytest.mark.parametrize(
    ("count", "kind"), [(3, "<polygon"), (30, "<polygon"), (31, 'class="heat"')]
)
def test_few_sources_are_areas_and_many_a_heat_map(tmp_path, count, kind):
    text = write_report(record(tmp_path, count)).read_text()
    assert text.count("<svg") == 5 and f"{count} sources mixed by odm" in text
    assert text.count(kind) == (count if count <= 30 else 31)
    assert "s<0>" not in text and "s&lt;0&gt;" in text
    assert "Passes over each source" in text and "uniform share" in text
    assert ("darkest: " in text) is (count > 30)


def test_the_bands_fill_the_picture(tmp_path):
    text = mixture_section(record(tmp_path, 3))
    heights = [
        [float(pair.split(",")[1]) for pair in points.split()]
        for points in re.findall(r'class="band" points="([^"]*)"', text)
    ]
    assert min(heights[2]) == pytest.approx(14) and max(heights[0]) == pytest.approx(314)
    middle = len(heights[0]) // 2
    assert heights[0][:middle] == heights[1][middle:][::-1]  # one ends where the next begins


def test_the_table_is_what_the_record_says(tmp_path):
    written = read_mixture(record(tmp_path, 3) / "mixture.jsonl")
    table = rows(written)
    last = written.lines[30]
    assert [line[0] for line in table] == written.sources
    assert [line[1] for line in table] == ["33.33%"] * 3
    assert [line[3] for line in table] == [f"{w:.2%}" for w in last["weights"]]
    read = (last["read"] + last["counts"]).tolist()
    assert sum(read) == 30 * 24 and [line[5] for line in table] == [f"{n}" for n in read]
    assert epochs(written)[-1] == pytest.approx(np.array(read) / [8, 18, 28])
    assert [line[8] for line in table] == ["2.000", "2.100", "2.200"]
    assert losses(written).shape == (30, 3)


def test_a_run_without_a_record_has_no_such_section(tmp_path):
    assert mixture_section(tmp_path) == ""


def test_long_records_are_drawn_by_means():
    steps, values = columns(range(1, 1001), np.ones((1000, 2)) * [1, 3], 100)
    assert len(steps) == 100 and steps[0] == 5.5 and (values == [1, 3]).all()
