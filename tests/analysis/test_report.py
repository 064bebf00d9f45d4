"""The report page: all that the folders hold, escaped, in one file that fetches nothing."""

import base64
import gzip
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from castalia.analysis import write_report
from castalia.analysis.axes import extremes
from castalia.analysis.page_file import FOLDER
from castalia.analysis.runs import read_run
from castalia.analysis.smoothing import WINDOWS
from castalia.analysis.sources import mixture_rows, passes, span_means
from castalia.cli.app import app
from castalia.core.errors import CastaliaError, ConfigError, DataError
from castalia.mixing import MixtureLog, Planner, Stats, make_mixer, read_mixture

VOID = {"meta"}


class Page(HTMLParser):
    """Collects tags, links and text; fails on a tag that closes another. `data` is unpacked."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.body = path.read_text(encoding="utf-8")
        self.feed(self.body)
        assert self.open == []
        plotly, data, self.script = self.scripts
        self.plotly = gzip.decompress(base64.b64decode(plotly)).decode()
        self.data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(data)))
        self.panels = {panel["title"]: panel for panel in self.data["panels"]}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [
            str(value) for key, value in attrs if key in ("src", "href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += f" {data}"

    def points(self, panel: str, place: int = 0) -> tuple[list[float], list[float]]:
        """Steps and values of a curve, as the page draws it."""
        points = self.panels[panel]["series"][place]["points"]
        return np.cumsum(points["steps"]).tolist(), points["values"]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(steps: int) -> list[dict[str, Any]]:
    """Lines with every key that training writes, with a resume, a skipped step and an overflow."""
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "loss": 8.0 / step + 2.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
        }
        line |= {"tokens": 64 * step, "rows_hash": 7, "loss_scale": 2.0**16, "updates": step}
        line |= {"time": 1e9 + 2.0 * step, "step_seconds": 2.0, "data_seconds": 0.1}
        line |= {"tokens_per_second": 32.0, "memory_bytes": 2**30, "accuracy": step / steps}
        line["sources"] = {"code": {"loss": 3.0, "tokens": 9}, "prose": {"loss": 2.0, "tokens": 9}}
        if step % 10 == 0:
            line |= {"valid_loss": 2.5, "valid_accuracy": 0.5, "valid": {"mean": 2.4}}
            line["valid_sources"] = {"code": {"loss": 2.5, "bits_per_byte": 1.5}}
        lines.append(line)
    lines[20] |= {"load_seconds": 0.5}
    lines[40] |= {"load_seconds": 0.5}  # of the rollback to step 40
    for line in lines[20:]:
        line["time"] += 1000.0  # the pause before the resume
    lines[30] |= {"skipped": "nan", "loss": None, "grad_norm": None, "tokens_per_second": 9e6}
    return lines


def mixture(folder: Path, count: int, steps: int = 30) -> None:
    """A record over `count` sources whose losses are 2.0, 2.1, ..."""
    names = [f"s<{i}>" for i in range(count)]
    mixer = make_mixer("odm", sources=names, eps=0.1 / count)
    planner = Planner(mixer, sizes=np.arange(count) * 10 + 8, rows=8 * count, seed=1)
    log = MixtureLog(folder / "mixture.jsonl", planner)
    for step in range(1, steps + 1):
        plan = planner.plan(step)
        stats = Stats(step, (2 + 0.1 * np.arange(count)) * plan.counts, plan.counts)
        planner.observe(stats)
        log.write(plan, stats)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with everything that a report can show."""
    folder = tmp_path_factory.mktemp("report") / "full"
    (folder / "evals").mkdir(parents=True)
    (folder / "samples").mkdir()
    write_lines(folder / "metrics.jsonl", metrics(50))
    rollback = {"step": 41, "event": "spike", "action": "rollback", "loss": 9.0, "to": 40}
    write_lines(folder / "events.jsonl", [rollback])
    marks = [
        {"step": s, "sources": {"code": {"bits_per_byte": 4.0 - s / 700}, "prose": {}}}
        for s in (50, 0, 1)
    ]
    for mark in marks:
        mark["sources"]["prose"]["bits_per_byte"] = 3.0
    (folder / "evals" / "bits_per_byte.json").write_text(json.dumps({"checkpoints": marks}))
    samples = [{"step": 0, "prompt": "if x <", "text": " y & <script>alert(1)</script>"}]
    (folder / "samples" / "samples.json").write_text(json.dumps(samples))
    tables = [{"title": "Speed & size", "header": ["", "int8"], "rows": [["tokens/s", "1<2"]]}]
    summary = {"title": "A <run>", "lead": "lead", "tiles": {"steps": 50}, "tables": tables}
    (folder / "summary.json").write_text(json.dumps(summary))
    model = "family: neox\n  num_layers: 1\n  hidden_size: 8\n  vocab_size: 9"
    (folder / "config.yaml").write_text(
        f"seed: 1 # <&>\nmodel:\n  {model}\n  num_attention_heads: 1\n"
        "data: {seq_length: 4}\ntrain: {steps: 60}\n"
    )
    (folder / "env.json").write_text(json.dumps({"torch": "2", "cores": 2}))
    mixture(folder, 3)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    """Its page."""
    return Page(write_report(run))


def test_everything_in_the_folder_is_on_the_page(page: Page):
    for text in (
        "A <run>",
        "Speed & size",
        "1<2",
        "<script>alert(1)</script>",
        "seed: 1 # <&>",
        "3 sources mixed by odm",
        "50 of 60",
        "spike: loss 9.0",
    ):
        assert text in page.text, text
    assert {
        "Loss",
        "Events",
        "Learning rate",
        "Gradient norm",
        "Loss scale",
        "Validation loss in several means",
        "accuracy",
        "Loss by source",
        "Mixture",
        "Passes over each source",
        "Distance to the prior",
        "Validation loss by source",
        "Validation bits per byte by source",
        "Bits per byte by source",
        "Tokens per second",
        "Time of a step",
        "Memory",
        "Saving and loading",
    } == set(page.panels)
    assert page.seen.count("figure") == len(page.panels)
    assert page.points("Bits per byte by source")[0] == [0, 1, 50]  # curves run by step


def test_the_page_is_one_file_and_fetches_nothing(run: Path, page: Page):
    assert page.links == [] and "link" not in page.seen and "img" not in page.seen
    style = (FOLDER / "page.css").read_text()
    for text in (style, page.script):
        assert "@import" not in text and "url(" not in text and "http" not in text
    assert "Plotly" in page.plotly[:200]
    size = (run / "report.html").stat().st_size
    assert 1_500_000 < size < 2_200_000  # Plotly alone is 4.8 MB as it comes


def test_what_is_drawn_as_each_step_is_each_step(page: Page):
    steps, values = page.points("Loss")
    assert steps == [step for step in range(1, 51) if step != 31]  # the skipped one has no loss
    assert values == [float(f"{8.0 / step + 2.0:.6g}") for step in steps]
    loss = page.panels["Loss"]["series"]
    assert loss[0]["whole"] and list(loss[0]["fits"]) == [f"{window:g}" for window in WINDOWS]
    assert [series["name"] for series in loss] == ["training", "validation"]
    assert loss[1]["marks"] and not loss[1]["fits"]
    (ended,) = re.findall(r"Loss, training, at the end \(nats per token\)\s+(\S+)", page.text)
    assert float(ended) == pytest.approx(2.16, abs=2e-3)


def test_a_step_that_was_left_out_has_no_speed(page: Page):
    assert set(page.points("Tokens per second")[1]) == {32.0}


def test_a_source_has_one_colour_in_all_panels(page: Page):
    colours: dict[str, set[int]] = {}
    for panel in page.panels.values():
        for series in panel["series"]:
            if series["name"] in ("code", "prose"):
                colours.setdefault(series["name"], set()).add(series["colour"])
    assert colours == {"code": {3}, "prose": {4}}  # after the three of the mixture


def test_a_long_curve_keeps_the_extremes_of_each_span():
    steps = np.arange(1, 100_001, dtype=float)
    values = np.sin(steps)
    values[77_776] = 50.0
    shown = extremes(steps, values)
    assert shown[:4000].tolist() == list(range(4000))  # one by one
    assert 77_776 in shown and len(shown) < 32_000 and shown[-1] == 99_999
    assert values[shown].min() == values.min()


def test_the_axes_leave_out_the_pause_before_a_resume(page: Page):
    axes = page.data["runs"][0]["axes"]
    assert axes["steps"] == list(range(1, 51))
    assert axes["tokens"] == [64 * step for step in range(1, 51)]
    assert axes["seconds"] == pytest.approx([2.0 * step for step in range(1, 51)])
    # 6 times (12 h² + the head's 128 h) for one layer, and 12 h T of attention.
    assert axes["flops"][0] == 64 * (6 * (12 * 8 * 8 + 128 * 8) + 12 * 8 * 4)


def test_events_stand_in_lanes(page: Page):
    lanes = {series["name"]: series for series in page.panels["Events"]["series"]}
    assert set(lanes) == {"resume", "skipped step", "rollback"}
    assert lanes["resume"]["texts"] == ["from step 20, read in 0.5 s"]
    assert lanes["rollback"]["texts"] == ["spike: loss 9.0, gradient norm None; back to step 40"]
    assert lanes["skipped step"]["points"]["steps"] == [31]


def test_a_run_of_older_code_has_a_page_without_times(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}])
    page = Page(write_report(tmp_path))
    assert list(page.panels) == ["Loss"] and tmp_path.name in page.text
    assert page.data["runs"][0]["axes"] == {
        "steps": [1, 2],
        "tokens": None,
        "seconds": None,
        "flops": None,
    }


def test_several_runs_lie_over_each_other(run: Path, tmp_path: Path):
    other = tmp_path / "other" / "full"
    other.mkdir(parents=True)
    write_lines(other / "metrics.jsonl", metrics(45))
    (other / "config.yaml").write_text("seed: 2\n")
    done = CliRunner().invoke(
        app, ["report", str(run / "config.yaml"), str(other), "-o", str(tmp_path / "both.html")]
    )
    assert done.exit_code == 0 and done.stdout == f"report: {tmp_path / 'both.html'}\n"
    page = Page(tmp_path / "both.html")
    names = [each["name"] for each in page.data["runs"]]
    assert names == [f"{run.parent.name}/full", "other/full"]  # as much as tells them apart
    assert [series["run"] for series in page.panels["Loss"]["series"]] == [0, 1, 0, 1]
    assert {series["colour"] for series in page.panels["Loss"]["series"]} == {None}
    assert [series["dash"] for series in page.panels["Loss"]["series"]] == [0, 0, 1, 1]
    sources = page.panels["Loss by source"]["series"]
    assert [(s["name"], s["run"], s["dash"]) for s in sources] == [
        ("code", 0, 0),
        ("code", 1, 1),
        ("prose", 0, 0),
        ("prose", 1, 1),
    ]
    assert "What differs" in page.text and "seed" in page.text
    assert f"Mixture of {names[0]}" in page.panels


@pytest.mark.parametrize(("count", "kind"), [(30, "shares"), (31, "heat")])
def test_few_sources_are_areas_and_many_a_heat_map(tmp_path: Path, count: int, kind: str):
    mixture(tmp_path, count, steps=400)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    page = Page(write_report(tmp_path))
    panel = page.panels["Mixture"]
    assert panel["kind"] == kind and len(panel["series"]) == count
    # Spans of 1/150 of the step, whose shares make a whole.
    columns = [series["points"]["values"] for series in panel["series"]]
    assert np.sum(columns, axis=0) == pytest.approx(100, abs=0.01)
    assert 150 < len(columns[0]) < 320
    # Of many sources those with the largest shares are switched on at first.
    few = page.panels["Passes over each source"]["few"]
    assert page.panels["Distance to the prior"]["few"] == []
    means = {name: row for name, *row in mixture_rows(read_run(tmp_path))}
    off = [float(means[name][1][:-1]) for name in means if name not in few]
    assert len(few) == 12 and max(off) <= min(float(means[name][1][:-1]) for name in few)
    assert "s<0>" not in (tmp_path / "report.html").read_text()  # escaped


def test_shares_and_epochs_are_what_the_record_says(tmp_path: Path):
    mixture(tmp_path, 3)
    record = read_mixture(tmp_path / "mixture.jsonl")
    steps, shares = span_means(np.array(record.steps, float), record.weights())
    assert steps.tolist() == record.steps and (shares == record.weights()).all()
    last = record.lines[30]
    read = (last["read"] + last["counts"]).tolist()
    assert sum(read) == 30 * 24 and passes(record)[-1] == pytest.approx(
        np.array(read) / [8, 18, 28]
    )
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    table = mixture_rows(read_run(tmp_path))
    assert [row[0] for row in table] == record.sources
    assert [row[1] for row in table] == ["33.33%"] * 3
    assert [row[3] for row in table] == [f"{weight:.2%}" for weight in last["weights"]]
    assert [row[5] for row in table] == [f"{count:,}" for count in read]
    assert [row[7] for row in table] == ["2.000", "2.100", "2.200"]
    page = Page(write_report(tmp_path))
    # Metrics without losses by source: those of the record.
    assert [page.points("Loss by source", i)[1][-1] for i in range(3)] == [2.0, 2.1, 2.2]


def test_a_long_record_is_drawn_by_means():
    steps = np.arange(1, 1001, dtype=float)
    ends, means = span_means(steps, np.ones((1000, 2)) * [1, 3])
    assert 300 < len(ends) < 500 and ends[-1] == 1000 and (means == [1, 3]).all()


def test_what_is_no_run_is_refused_with_the_reason(run: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"has neither metrics\.jsonl nor summary"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="does not exist; expected the folder of a run"):
        write_report(tmp_path / "gone")
    with pytest.raises(DataError, match=f"does not exist; did you mean '{run}'"):
        write_report(run.with_name(run.name[1:]))
    with pytest.raises(DataError, match=r"holds runs \(full\) but is none itself"):
        read_run(run.parent)
    with pytest.raises(DataError, match="named twice"):
        write_report([run, run / "config.yaml"])
    with pytest.raises(ConfigError, match=r"is a folder; name the file to write"):
        write_report(run, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"metrics\.jsonl has no step yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 3.0}\n')
    with pytest.raises(DataError, match=r"line 1: expected an object with a step"):
        write_report(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "bits_per_byte.json").write_text("{")
    with pytest.raises(DataError, match=r"bits_per_byte\.json is not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_without_plotly_one_sentence_says_what_to_install(run: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    with pytest.raises(CastaliaError, match=r"a report page needs 'plotly.*\[report\]"):
        write_report(run)


def test_a_report_of_a_running_run_leaves_its_files_alone(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0}])
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 2, "lo')  # being written
    before = (tmp_path / "events.jsonl").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "events.jsonl").read_bytes() == before
    assert read_run(tmp_path).curve("loss")[0].tolist() == [1]


CONES = {
    "all": np.eye(3),
    "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
}
"""What linear RGB looks like to eyes with these cones. Machado et al. 2009, severity 1."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ.sum(axis=1)


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb, by WCAG 2.1."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, from 1 to 21."""
    dark, bright = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab of linear RGB."""
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_every_curve_stands_out_from_its_card_and_from_the_others():
    themes = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    assert len(themes) == 2  # light and dark
    for theme in themes:
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", theme))
        curves = [colours[f"c{i}"] for i in range(8)]
        assert min(contrast(curve, colours["card"]) for curve in curves) >= 3
        assert min(contrast(colours[text], colours["card"]) for text in ("ink", "soft")) >= 4.5
        for cones, matrix in CONES.items():
            looks = [lab(np.array(matrix) @ linear(curve)) for curve in curves]
            apart = min(np.linalg.norm(a - b) for a, b in itertools.combinations(looks, 2))
            assert apart > 20, (cones, apart)


def test_no_text_of_a_run_is_html(tmp_path):
    evil = "<script>alert('pwned')</script>"
    run = tmp_path / "r<img src=x>"
    (run / "samples").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 2.0, evil: 1.0}) + "\n" for step in (1, 2))
    )
    sample = {"prompt": evil, "text": evil, "step": 1}
    (run / "samples" / "samples.json").write_text(json.dumps([sample]))
    table = {"title": evil, "about": evil, "header": [evil], "rows": [[evil]]}
    summary = {"title": evil, "lead": evil, "tiles": {evil: evil}, "tables": [table]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "env.json").write_text(json.dumps({evil: evil}))
    page = write_report(run).read_text()
    assert evil not in page and page.count("&lt;script&gt;alert(") > 12
    both = tmp_path / "other"
    both.mkdir()
    (both / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "<img" not in write_report([run, both], tmp_path / "two.html").read_text()
