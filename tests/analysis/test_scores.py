"""Results tables as the data of a page: names, means over groups, packed curves, inputs."""

import base64
import gzip
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.analysis.test_report import CONES, Page, contrast, lab, linear
from tests.fixtures.suite_results import SEEDS, SIZES, STEPS, score, write_suite

from castalia.analysis import write_report
from castalia.analysis.inputs import find_inputs
from castalia.analysis.page_file import FOLDER
from castalia.analysis.score_names import ModelName, families, parameters_of, size_of
from castalia.analysis.scores import scores_data
from castalia.core.errors import DataError
from castalia.results import Result, ResultsStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultsStore:
    """A store with the suite."""
    return ResultsStore(write_suite(tmp_path_factory.mktemp("scores") / "toy"))


@pytest.fixture(scope="module")
def data(store: ResultsStore) -> dict[str, Any]:
    """Its data."""
    return scores_data([store], {("toy", "toy-4m-seed2"): 7, ("mine", "opt-350m"): 8}) or {}


def curves(data: Mapping[str, Any], task: str) -> dict[str, tuple[list[int], Any, Any]]:
    """Steps, values and errors of a task by model, as the page unpacks them."""
    found = {}
    for who, _, grid, values, errors in json.loads(
        gzip.decompress(base64.b64decode(data["blocks"][task]))
    ):
        steps = np.cumsum(data["steps"][grid]).tolist()
        found[data["models"][who]["model"]] = (steps, values, errors)
    return found


def test_every_number_is_in_the_block_of_its_task(data: dict[str, Any]):
    found = curves(data, "lambada_openai")
    assert len(found) == len(SIZES) * len(SEEDS) + 3
    for label, size in SIZES.items():
        for seed in SEEDS:
            steps, values, errors = found[f"toy-{label}-seed{seed}"]
            assert steps == list(STEPS) and errors == [0.01] * len(STEPS)
            assert values == pytest.approx([score(size, seed, step, 1) for step in STEPS], rel=1e-5)
    assert found["opt-125m"] == ([-1], [0.41], [0.007])  # a published score names no step
    assert len(data["steps"]) == 2  # the steps that curves share stand once
    assert data["about"] == "489 numbers of 12 models in 7 tasks and means."


def test_a_model_says_what_the_axes_need(data: dict[str, Any]):
    models = {model["model"]: model for model in data["models"]}
    toy = models["toy-4m-seed2"]
    assert {key: toy[key] for key in ("family", "size", "order", "seed", "last")} == {
        "family": "toy",
        "size": "4m",
        "order": 4e6,
        "seed": 2,
        "last": 100,
    }
    assert toy["tokens_per_step"] == 1000 and toy["flops_per_token"] == 7 and toy["counted"]
    assert models["toy-16m-seed1"]["flops_per_token"] == 6 * 16e6
    # A run of one's own with a published name gives nothing to the published model.
    assert toy["own"] and not models["opt-350m"]["own"] and not models["opt-350m"]["counted"]
    assert models["opt-350m"]["last"] is None and models["opt-350m"]["family"] == "opt"


def test_the_mean_of_a_group_is_a_task_where_the_group_is_whole(data: dict[str, Any], tmp_path):
    (mean,) = [task for task in data["tasks"] if task["of"]]
    assert mean["name"] == "MMLU" and mean["of"] == 3
    assert [task["group"] for task in data["tasks"]].count("MMLU") == 3
    steps, values, errors = curves(data, "MMLU")["toy-1m-seed1"]
    expected = [np.mean([score(10**6, 1, step, place) for place in (2, 3, 4)]) for step in steps]
    assert steps == list(STEPS) and values == pytest.approx(expected, rel=1e-5)
    assert set(errors) == {0.00577}  # 0.01 over the root of 3
    rows = [
        Result(suite="s", model="m", step=step, task=f"mmlu_{name}", metric="acc", value=0.5)
        for step, names in ((1, "abc"), (2, "ab"))
        for name in names
    ]
    parts = ResultsStore(tmp_path)
    parts.add(rows)
    found = curves(scores_data([parts]) or {}, "MMLU")
    assert found == {"m": ([1], [0.5], [])}  # step 2 lacks a task; nothing has an error


def test_names_tell_size_seed_and_family():
    def name(model: str, size: str | None = None, parameters: int | None = None) -> ModelName:
        return ModelName("s", model, "", None, size, parameters)

    published = [name("pythia-1.4b-deduped", "1.4b"), name("bloom-1b7"), name("toy-70m-seed3")]
    assert families(published) == ["pythia-deduped", "bloom", "toy"]
    assert [size_of(each)[0] for each in published] == ["1.4b", "1b7", "70m"]
    assert size_of(published[1])[1] == parameters_of("1b7") == 1.7e9
    # Names without a size: one family if the sizes differ, else each its own.
    assert families([name("tiny", None, 10), name("small", None, 20)]) == ["s", "s"]
    assert families([name("a", None, 10), name("b", None, 10)]) == ["a", "b"]
    assert size_of(name("tiny", None, 14_067_712)) == ("14.1m", 14_067_712.0)
    assert size_of(name("gpt-2")) == ("", 0.0) and families([name("gpt-2")]) == ["gpt-2"]


def test_paths_are_runs_suites_and_stores(store: ResultsStore, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "runs" / name / "evals").mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    row = Result(suite="runs", model="a", task="t", metric="acc", value=0.5, step=1)
    ResultsStore(tmp_path / "runs" / "a" / "evals").add([row])
    found = find_inputs([tmp_path / "runs", tmp_path / "runs" / "a", store.path])
    assert [run.name for run in found.runs] == ["b", "a"]  # a is named twice
    assert [each.path.parent.parent.name for each in found.stores[:1]] == ["a"]
    assert len(found.stores) == 2  # the store of a is named twice and stands once
    page = Page(write_report([tmp_path / "runs", store.folder], tmp_path / "out.html"))
    assert [run["name"] for run in page.data["runs"]] == ["a", "b"]
    assert page.data["scores"]["about"].startswith("490 numbers of 13 models")
    assert page.text.count("2 runs") == 2  # as title and as heading


def test_samples_and_bits_of_several_runs_stand_side_by_side(tmp_path: Path):
    for place, name in enumerate(("a", "b")):
        run = tmp_path / name
        (run / "samples").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        samples = [
            {"step": step, "prompt": "if <", "text": f" {name}{step} &"} for step in (0, 8 + place)
        ]
        (run / "samples" / "samples.json").write_text(json.dumps(samples))
        row = Result(
            suite="s",
            model=name,
            step=1,
            task="bits_per_byte/code",
            metric="bits_per_byte",
            value=1.5 + place,
            task_version="1",
        )
        # What a validation wrote is in metrics.jsonl.
        ResultsStore(run / "evals").add([row, row._replace(step=2, task_version="validation")])
    page = Page(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out.html"))
    rows = re.findall(r"<tr><th>(\d)</th><td>(.*?)</td><td>(.*?)</td></tr>", page.body)
    assert rows == [
        ("0", "<pre><b>if &lt;</b> a0 &amp;</pre>", "<pre><b>if &lt;</b> b0 &amp;</pre>"),
        ("8", "<pre><b>if &lt;</b> a8 &amp;</pre>", "–"),
        ("9", "–", "<pre><b>if &lt;</b> b9 &amp;</pre>"),
    ]
    bits = page.panels["Bits per byte by source"]["series"]
    assert [(each["run"], each["points"]) for each in bits] == [
        (0, {"steps": [1], "values": [1.5]}),
        (1, {"steps": [1], "values": [2.5]}),
    ]


def test_a_store_alone_has_a_page_and_an_empty_one_is_refused(store: ResultsStore, tmp_path: Path):
    path = write_report(store.folder)
    assert path == store.folder / "report.html"
    page = Page(path)
    assert page.data["panels"] == [] and "Evaluations of toy" in page.text
    assert "489 numbers" in page.text and page.links == []
    empty = ResultsStore(tmp_path)
    empty.add([Result(suite="s", model="m", task="t", metric="ppl", value=float("inf"), step=1)])
    with pytest.raises(DataError, match="has no number yet"):
        write_report(tmp_path)
    empty.path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        write_report(empty.path)


def test_a_page_without_results_has_no_part_for_them(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    page = Page(write_report(tmp_path))
    assert "scores" not in page.data
    assert 'id="scores"' not in (tmp_path / "report.html").read_text().split("<script")[0]


def test_the_colours_of_sizes_are_in_order_for_all_eyes():
    pages = [(FOLDER / name).read_text() for name in ("page.css", "scores.css")]
    cards = re.findall(r"--card:(#[0-9a-f]{6})", pages[0])
    themes = re.findall(r":root \{(.*?)\}", pages[1], re.DOTALL)
    assert len(cards) == len(themes) == 2  # light and dark
    for card, theme in zip(cards, themes, strict=True):
        stops = [linear_parts(colour) for colour in re.findall(r"--s\d:(#[0-9a-f]{6})", theme)]
        shades = [shade(stops, place / 7) for place in range(8)]
        contrasts = [contrast(each, card) for each in shades]
        # Larger models stand out more, and the smallest enough.
        assert min(contrasts) >= 3 and contrasts == sorted(contrasts)
        for cones, matrix in CONES.items():
            looks = [lab(np.array(matrix) @ linear(each)) for each in shades]
            apart = [np.linalg.norm(one - other) for one, other in itertools.pairwise(looks)]
            assert min(apart) > 7, (cones, apart)


def linear_parts(colour: str) -> np.ndarray:
    """Red, green and blue of #rrggbb, 0 to 255."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], float)


def shade(stops: list[np.ndarray], share: float) -> str:
    """The colour at a place of the scale, as score_data.js mixes it."""
    place = min(share * 4, 3.9999)
    low = int(place)
    mixed = stops[low] + (place - low) * (stops[low + 1] - stops[low])
    return "#" + "".join(f"{round(each):02x}" for each in mixed)
