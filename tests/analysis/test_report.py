"""The report page: made from the files in a run's folder, escaped, self-contained."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from castalia.analysis import write_report
from castalia.analysis.report import smooth, thin
from castalia.core.errors import DataError

VOID = {"meta"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that closes another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [
            str(value) for key, value in attrs if key in ("src", "href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with everything that a report can show."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "samples").mkdir()
    lines = [
        {"step": s, "loss": 8.0 / s + 2.0, "lr": 1e-3, "tokens": 64 * s} for s in range(1, 701)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marks = [
        {
            "step": step,
            "sources": {
                "code": {"bits_per_byte": 4.0 - step / 700},
                "prose": {"bits_per_byte": 3.0},
            },
        }
        for step in (700, 0, 1)
    ]
    (tmp_path / "evals" / "bits_per_byte.json").write_text(json.dumps({"checkpoints": marks}))
    samples = [{"step": 0, "prompt": "if x <", "text": " y & <script>alert(1)</script>"}]
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(samples))
    tables = [{"title": "Speed & size", "header": ["", "int8"], "rows": [["tokens/s", "1<2"]]}]
    summary = {"title": "A <run>", "lead": "lead", "tiles": {"steps": 700}, "tables": tables}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text("seed: 1 # <&>\n")
    (tmp_path / "env.json").write_text(json.dumps({"torch": "2", "cores": 2}))
    return tmp_path


def test_everything_in_the_folder_is_on_the_page(run: Path):
    page = Page(write_report(run).read_text())
    assert page.open == []
    assert page.seen.count("svg") == 2 and "script" not in page.seen and "link" not in page.seen
    assert page.links == []  # nothing to fetch
    for text in (
        "A <run>",
        "Speed & size",
        "1<2",
        "<script>alert(1)</script>",
        "seed: 1 # <&>",
        "3.000",
        "700",
    ):
        assert text in page.text
    assert page.text.index("step 700 · 3") > page.text.index("step 0 · 4")  # curves run by step


def test_the_style_fetches_nothing(run: Path):
    text = write_report(run).read_text()
    assert "@import" not in text and "url(" not in text and "http" not in text


def test_a_folder_with_metrics_alone_gives_the_loss_curve(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n')
    page = Page(write_report(tmp_path).read_text())
    assert (
        page.seen.count("svg") == 1
        and "Bits per byte" not in page.text
        and tmp_path.name in page.text
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"has neither metrics\.jsonl nor summary"):
        write_report(tmp_path)


def test_a_broken_file_is_named(run: Path):
    (run / "evals" / "bits_per_byte.json").write_text("{")
    with pytest.raises(DataError, match=r"bits_per_byte\.json is not JSON"):
        write_report(run)


def test_long_curves_are_thinned_by_means():
    points = [(float(x), 2.0) for x in range(1, 100_000)]
    few = thin(points)
    assert 100 < len(few) <= 401
    assert all(y == 2.0 for _, y in few) and few == sorted(few)
    assert thin(points[:10]) == points[:10]


def test_the_mean_curve_starts_at_the_first_value_and_comes_to_a_constant():
    assert smooth([(1.0, 8.0)]) == [(1.0, 8.0)]
    assert smooth([(float(x), 8.0 if x == 1 else 2.0) for x in range(1, 2000)])[-1][
        1
    ] == pytest.approx(2.0, abs=1e-3)
