"""Cohen's kappa against scikit-learn and by hand; and the comparisons that stored answers allow."""

import json
from pathlib import Path

import pytest

from castalia.cli.app import app
from castalia.core.errors import DataError
from castalia.eval.jobs import sample_file, write_samples
from castalia.results import Result, ResultsStore
from castalia.weights.agreement import SEEDS, SELF, agreements, answer_of, cohen_kappa, group_of

LETTERS = {
    ("m-seed0", 1): "aaaaabbbbb",
    ("m-seed0", 2): "aabbccaabb",
    ("m-seed0", 4): "aabbccaaba",
    ("m-seed1", 1): "bbbbbaaaaa",
    ("m-seed1", 2): "aabbccaabb",
    ("m-seed1", 4): "cabbccaaba",
}
"""The answers of each checkpoint to ten questions."""


@pytest.fixture
def suite(tmp_path) -> Path:
    """Results of two seeds at three steps, with their samples as the harness writes them."""
    store = ResultsStore(tmp_path / "suite" / "evals")
    for (model, step), letters in LETTERS.items():
        row = Result("suite", model, "piqa", "acc", step / 10, step=step, shots=0, documents=10)
        samples = []
        for number, letter in enumerate(letters):
            likelihoods = [-1.0 if each == letter else -2.0 for each in "abc"]
            responses = [[value, False] for value in likelihoods]
            samples.append({"doc_id": number, "filtered_resps": responses, "filter": "none"})
        write_samples(sample_file(store.folder, [row]), samples)
        store.add([row])
    return tmp_path / "suite"


def test_kappa_by_hand_and_against_scikit_learn():
    # Equal on 7 of 10; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    one = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    other = [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa("aabb", "aabb") == 1
    assert cohen_kappa("aabb", "bbaa") == -1
    assert cohen_kappa("aaaa", "aaaa") is None
    with pytest.raises(ValueError, match="3 and 4"):
        cohen_kappa("aaa", "aaaa")
    metrics = pytest.importorskip("sklearn.metrics")
    for left in LETTERS.values():
        for right in LETTERS.values():
            expected = metrics.cohen_kappa_score(list(left), list(right))
            assert cohen_kappa(left, right) == pytest.approx(expected)


def test_comparisons_of_a_suite(suite):
    rows = agreements([str(suite)])
    kinds = [(row.kind, row.model, row.step, row.other, row.other_step) for row in rows]
    assert kinds == [
        *((SELF, model, step, model, 4) for model in ("m-seed0", "m-seed1") for step in (1, 2)),
        *((SEEDS, "m-seed0", step, "m-seed1", step) for step in (1, 2, 4)),
    ]
    by_place = {(row.kind, row.model, row.step): row for row in rows}
    # The last of ten answers differs; by chance 0.4 * 0.5 + 0.4 * 0.3 + 0.2 * 0.2 are equal.
    own = by_place[SELF, "m-seed0", 2]
    assert (own.observed, own.documents, own.accuracy) == (0.9, 10, 0.2)
    assert own.expected == pytest.approx(0.36) and own.kappa == pytest.approx(0.54 / 0.64)
    assert by_place[SEEDS, "m-seed0", 1].kappa == pytest.approx(-1)
    assert by_place[SEEDS, "m-seed0", 2].kappa == 1


def test_the_command_and_its_picture(suite, tmp_path, capsys):
    picture = tmp_path / "agreement.svg"
    words = ["agreement", str(suite), "--picture", str(picture), "--page", f"{picture}.html"]
    app([*words, "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 7 and rows[0]["group"] == "m"
    text = picture.read_text()
    for word in ("piqa: accuracy", "kappa with the last step", "kappa between seeds", "<polygon"):
        assert word in text
    # Each chart an element of its own: the page reflows.
    assert Path(f"{picture}.html").read_text().count('<svg xmlns="http') == 3
    app(["agreement", str(suite), "--task", "piqa"], standalone_mode=False)
    assert "0.844" in capsys.readouterr().out


def test_answers_and_bad_input(suite, tmp_path):
    assert answer_of([[-3.0, False], [-1.5, False], [-2.0, True]]) == 1
    assert answer_of([[-3.0, True]]) is True
    assert answer_of(["42"]) == "42"
    assert group_of("160m-deduped-weight-seed3") == "160m-deduped" and group_of("seed1") == "seed1"
    with pytest.raises(DataError, match="no answers of copa"):
        agreements([str(suite)], "copa")
    file = next((suite / "evals" / "samples").iterdir())
    file.write_text('{"doc_id": 1}\n')
    with pytest.raises(DataError, match=":1: expected a sample of castalia eval"):
        agreements([str(suite)])
