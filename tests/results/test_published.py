"""The published results of Pythia, OPT and BLOOM: every file, and the numbers that they hold."""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from castalia.results import Imported, ResultsStore, import_results
from castalia.results.query import Source, select

FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "pythia-evals"
pytestmark = pytest.mark.skipif(
    not FILES.is_dir(), reason="needs the published result files, shared/data/pythia-evals"
)
FINAL = """
70m .1846 142.43 .5947 .5280 .3737 .6010 .3654 .2104 .2565 .1809 .2210 .2529
160m .3284 38.06 .6273 .5312 .4352 .7410 .3654 .1905 .2442 .1877 .2329 .2440
410m .5162 10.83 .6676 .5367 .5210 .8110 .5673 .2197 .2903 .2133 .2432 .2552
1b .5620 7.92 .7073 .5367 .5694 .8400 .3654 .2227 .2980 .2440 .2713 .2590
1.4b .6161 6.09 .7089 .5730 .6065 .8650 .3654 .2104 .2734 .2602 .2858 .2687
2.8b .6472 5.04 .7388 .5943 .6439 .8820 .3846 .2120 .2826 .2952 .3328 .2614
6.9b .6728 4.45 .7524 .6093 .6734 .8970 .3654 .2535 .3026 .3131 .3507 .2825
12b .7046 3.92 .7601 .6393 .7024 .9020 .5481 .2243 .3057 .3183 .3481 .2680
70m-deduped .1915 138.45 .5979 .4917 .3847 .6060 .3654 .2350 .2627 .1621 .2039 .2513
160m-deduped .3417 32.22 .6181 .4972 .4402 .7200 .3654 .2104 .2750 .2005 .2415 .2548
410m-deduped .5244 10.57 .6746 .5335 .5168 .8260 .4712 .2089 .2811 .2022 .2534 .2532
1b-deduped .5804 7.41 .7002 .5288 .5846 .8700 .3654 .2120 .2826 .2449 .2654 .2532
1.4b-deduped .6187 6.11 .7203 .5659 .6170 .8650 .4423 .2212 .2857 .2722 .2978 .2658
2.8b-deduped .6515 5.00 .7410 .5825 .6347 .8820 .3846 .2135 .2811 .3012 .3294 .2617
6.9b-deduped .6889 4.16 .7601 .6306 .6860 .9110 .4423 .2151 .2750 .3311 .3524 .2724
12b-deduped .7097 3.87 .7628 .6598 .7079 .9290 .3942 .2243 .2903 .3319 .3823 .2839
"""
"""Of each model at step 143000 without examples: lambada acc and ppl, piqa, winogrande, arc_easy,
sciq, wsc, logiqa acc and acc_norm, arc_challenge acc and acc_norm, mean of MMLU; as published."""
COLUMNS = """
SELECT model, {columns}, avg(value) FILTER (task LIKE 'hendrycksTest-%' AND metric = 'acc')
FROM results WHERE suite = 'pythia-v1' AND step = 143000 AND shots = 0 AND variant = ''
GROUP BY model
"""
TASKS = [
    *(("lambada_openai", "acc"), ("lambada_openai", "ppl"), ("piqa", "acc"), ("winogrande", "acc")),
    *(("arc_easy", "acc"), ("sciq", "acc"), ("wsc", "acc"), ("logiqa", "acc")),
    *(("logiqa", "acc_norm"), ("arc_challenge", "acc"), ("arc_challenge", "acc_norm")),
]


class Published(NamedTuple):
    """The imported files, and the table that they made."""

    done: Imported
    again: Imported
    table: object
    store: ResultsStore

    def ask(self, sql: str) -> list[tuple]:
        return select(Source(self.table), sql)[1]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    store = ResultsStore(tmp_path_factory.mktemp("published"))
    done = import_results([FILES], store)
    before = store.path.read_bytes()
    again = import_results([FILES], store)
    assert store.path.read_bytes() == before
    return Published(done, again, store.table(), store)


def test_every_file_is_imported_and_twice_changes_nothing(published):
    done = published.done
    assert done.problems == []
    assert (done.files, done.rows, done.dropped, done.total) == (118, 24320, 195, 24125)
    assert done.suites == {
        "pythia-v1": (88, 13536),
        "pythia-v0": (17, 9120),
        "opt": (8, 1024),
        "bloom": (5, 640),
    }
    assert published.again == done
    assert published.ask("select count(*) from results") == [(24125,)]


def test_the_final_table_is_the_published_one(published):
    columns = ", ".join(
        f"any_value(value) FILTER (task = '{task}' AND metric = '{metric}')"
        for task, metric in TASKS
    )
    got = {row[0]: row[1:] for row in published.ask(COLUMNS.format(columns=columns))}
    expected = [line.split() for line in FINAL.strip().splitlines()]
    assert set(got) == {f"pythia-{size}" for size, *_ in expected}
    for size, *numbers in expected:
        for name, number, value in zip(
            [*TASKS, "MMLU"], numbers, got[f"pythia-{size}"], strict=True
        ):
            digits = len(number.partition(".")[2])
            assert f"{value:.{digits}f}".lstrip("0") == number, (size, name)


def test_step_0_equals_step_1_and_differs_from_step_2(published):
    differing = """
    SELECT b.step, count(*), count(*) FILTER (a.value != b.value)
    FROM results a JOIN results b USING (suite, model, variant, task, metric, shots)
    WHERE suite = 'pythia-v1' AND a.step = 0 AND b.step IN (1, 2) GROUP BY b.step ORDER BY b.step
    """
    (first, second) = published.ask(differing)
    # 87 tasks of two models, most with two metrics.
    assert first == (1, 344, 0)
    assert second[0] == 2 and second[1] == 344 and second[2] > 50


def test_small_models_degrade_late(published):
    late = """
    SELECT model, step, round(value, 3) FROM results WHERE suite = 'pythia-v1' AND metric = 'acc'
    AND task = 'lambada_openai' AND shots = 0 AND model IN ('pythia-70m', 'pythia-160m')
    AND step IN (512, 1000, 3000, 13000, 33000, 63000, 83000, 103000, 123000, 143000)
    ORDER BY model DESC, step
    """
    curves = [value for _, _, value in published.ask(late)]
    assert curves[:10] == [0, 0.05, 0.121, 0.21, 0.223, 0.233, 0.226, 0.226, 0.204, 0.185]
    assert curves[10:] == [0, 0.065, 0.228, 0.3, 0.331, 0.399, 0.372, 0.367, 0.331, 0.328]
    (final,) = published.ask(
        "SELECT round(value, 3), evaluated_at, harness, dtype, engine, batch, task_version"
        " FROM results WHERE suite = 'pythia-v0' AND model = 'pythia-70m' AND step = 143000"
        " AND task = 'lambada_openai' AND metric = 'acc'"
    )
    when = datetime(2022, 11, 25, 10, 16, 50)
    assert final == (0.239, when, "lm-eval <0.4", "fp16", "neox", 32, "0")


def test_of_two_evaluations_of_a_step_the_newer_stands(published):
    rows = published.ask(
        "SELECT DISTINCT evaluated_at, source FROM results"
        " WHERE suite = 'pythia-v0' AND step = 123000 AND model = 'pythia-70m'"
    )
    ((when, source),) = rows
    assert when == datetime(2022, 11, 25, 8, 12, 38) and "11-25-2022-08-12-38" in source


def test_shots_sizes_and_tokens(published):
    shots = "SELECT shots, count(DISTINCT source) FROM results WHERE suite = 'pythia-v1' AND"
    assert published.ask(f"{shots} source LIKE '%five-shot%' GROUP BY shots") == [(5, 14)]
    assert published.ask(f"{shots} source LIKE '%zero-shot%' GROUP BY shots") == [(0, 68)]
    facts = published.ask(
        "SELECT DISTINCT suite, model, size, parameters, seed, last_step, step, tokens"
        " FROM results WHERE model IN ('pythia-1b', 'opt-66b', 'bloom-560m') ORDER BY suite"
    )
    assert facts == [
        ("bloom", "bloom-560m", "560m", 559_214_592, None, None, None, None),
        ("opt", "opt-66b", "66b", 65_719_701_504, None, None, None, None),
        ("pythia-v1", "pythia-1b", "1b", 1_011_781_632, 1234, 143_000, 143_000, 299_892_736_000),
    ]


def test_pronouns_and_terms(published):
    bias = """
    SELECT variant, step, any_value(shots), round(avg(value), 4),
    round(avg(value) FILTER (task LIKE '%_pro+%') - avg(value) FILTER (task LIKE '%_anti+%'), 4),
    count(*) FROM results WHERE task LIKE 'wino_bias%' AND metric = 'em'
    AND model = 'pythia-410m-deduped' AND suite = 'pythia-v1'
    GROUP BY variant, step ORDER BY variant, step
    """
    assert published.ask(bias) == [
        ("", 53000, 0, 0.1477, 0.0606, 8),
        ("", 63000, 0, 0.1875, 0.125, 8),
        ("", 137000, 0, 0.1439, 0.0972, 8),
        ("intervention", 134000, None, 0.2677, 0.125, 8),
        ("intervention", 140000, None, 0.2134, 0.0808, 8),
        ("intervention", 141000, None, 0.2068, 0.0751, 8),
    ]
    (one,) = published.ask(
        "SELECT value, stderr FROM results WHERE step = 137000"
        " AND task = 'wino_bias_type1_pro+What does p stand for'"
    )
    assert one == (0.49242424242424243, 0.025154842395494467)
    terms = published.ask(
        "SELECT task LIKE '%_addition_%', round(avg(value), 3), count(*) FROM results"
        " WHERE task LIKE 'num_reasoning%' AND step = 143000 AND shots = 16 GROUP BY 1 ORDER BY 1"
    )
    assert terms == [(False, 0.058, 100), (True, 0.051, 100)]
