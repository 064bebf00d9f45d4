"""Statistics of memorization against scipy, numpy and cases that are computed by hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tests.fixtures.scans import scan_file, scan_table

from castalia.core.errors import CastaliaError, CheckpointError, ConfigError, DataError
from castalia.corpus import prepare
from castalia.memorization.analyses import table as tables
from castalia.memorization.analyses.density import Density, counts_in_windows, window_of
from castalia.memorization.analyses.doses import Doses
from castalia.memorization.analyses.files import open_scans
from castalia.memorization.analyses.intervals import (
    binomial_interval,
    chi_square_shares,
    mean_interval,
    poisson_shares,
    student_quantile,
)
from castalia.memorization.analyses.joint import (
    Confusion,
    confusion_of,
    memorized_correlation,
    rank_correlation,
    score_correlation,
    top_of,
)
from castalia.memorization.analyses.losses import Losses
from castalia.memorization.analyses.output import write_numbers
from castalia.memorization.analyses.positions import Positions
from castalia.memorization.analyses.study import study_of
from castalia.stream.opening import open_stream
from castalia.stream.same_data import training_hash

Suite = tuple[Path, dict[str, dict[int, np.ndarray]]]


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Suite:
    """A folder of scans of three sizes, of 500 and 2,000 rows; matches by size and checkpoint."""
    rng = np.random.default_rng(1)
    ease = rng.beta(0.5, 1.5, 2000)
    folder = tmp_path_factory.mktemp("scans")
    made: dict[str, dict[int, np.ndarray]] = {}
    for place, size in enumerate(("14m", "70m", "1b")):
        made[size] = {
            step: rng.binomial(32, np.clip(ease[: 10 * step] * (1 + 0.1 * place), 0, 1))
            for step in (50, 200)
        }
        scan_file(folder / f"{size}.parquet", scan_table(made[size], seed=place))
    return folder, made


def test_intervals_and_tails_equal_those_of_scipy():
    for freedom in (1, 2, 3, 29):
        for level in (0.5, 0.95, 0.99):
            expected = stats.t.ppf((1 + level) / 2, freedom)
            assert student_quantile(freedom, level) == pytest.approx(expected, rel=1e-12)
    for freedom in (30, 1000, 10**8):
        expected = stats.t.ppf(0.975, freedom)
        assert student_quantile(freedom) == pytest.approx(expected, abs=1e-7)
    for hits, rows in ((0, 10), (10, 10), (3, 20), (34340259, 146432000)):
        expected = stats.binomtest(hits, rows).proportion_ci(method="wilson")
        assert binomial_interval(hits, rows) == pytest.approx(tuple(expected), rel=1e-9)
    assert binomial_interval(0, 0) is None and mean_interval(1, 1.0, 1.0) is None
    values = np.array([0.5, 0.25, 1.0, 0.0, 0.125])
    expected = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert mean_interval(5, values.sum(), values @ values) == pytest.approx(expected)
    for value, freedom in ((3.0, 5), (300, 280), (285_000, 286_000), (1e-9, 4), (500, 4)):
        below, above = chi_square_shares(value, freedom)
        assert below == pytest.approx(stats.chi2.cdf(value, freedom), rel=1e-9, abs=1e-15)
        assert above == pytest.approx(stats.chi2.sf(value, freedom), rel=1e-9)
    assert poisson_shares(2.5, 40) == pytest.approx(stats.poisson.pmf(range(41), 2.5))


# Of Pythia v0, corrected: share memorized at 23k and at 143k steps; recall and precision of the
# model at 23k for itself at 143k; those of the model for the 12B one, both at 143k. Shares are
# percent of the first 23.55 million rows.
PUBLISHED = {
    "70m": (0.273, 0.318, 0.75, 0.87, 0.197, 0.956),
    "160m": (0.370, 0.472, 0.69, 0.88, 0.289, 0.948),
    "410m": (0.466, 0.660, 0.63, 0.88, 0.401, 0.940),
    "1b": (0.575, 0.851, 0.60, 0.89, 0.512, 0.931),
    "1.4b": (0.612, 0.926, 0.59, 0.89, 0.554, 0.926),
    "2.8b": (0.702, 1.119, 0.56, 0.90, 0.658, 0.909),
    "6.9b": (0.777, 1.391, 0.51, 0.92, 0.795, 0.884),
    "12b": (0.841, 1.546, 0.50, 0.92, 1.0, 1.0),
}
ROWS = 23_000 * 1024


def confusion_from(predicted: float, actual: float, recall: float) -> Confusion:
    """A confusion of ROWS from percentages of them."""
    hits = round(ROWS * actual / 100 * recall)
    alarms = round(ROWS * predicted / 100) - hits
    misses = round(ROWS * actual / 100) - hits
    return Confusion(hits, alarms, misses, ROWS - hits - alarms - misses)


def test_the_corrected_published_numbers_agree_with_each_other():
    for early, late, recall, precision, large_recall, large_precision in PUBLISHED.values():
        own = confusion_from(early, late, recall)
        assert own.recall == pytest.approx(recall, abs=1e-4)
        # Recall and precision are rounded to two digits, the shares to three.
        rounding = 0.005 * (1 + precision / recall) + 0.001 / early
        assert own.precision == pytest.approx(precision, abs=rounding)
        large = confusion_from(late, 1.546, large_recall)
        assert large.precision == pytest.approx(large_precision, abs=0.004)


def test_recall_and_precision_are_not_exchanged_as_in_the_published_code():
    # As the 12B model at 23k and at 143k: of 155 rows memorized at the end 77 are so early, and 7
    # are early alone.
    predictor = np.zeros(20_000, int)
    target = np.zeros(20_000, int)
    target[:155] = 1
    predictor[:77] = 1
    predictor[155:162] = 1
    counts = np.zeros((2, 2), np.int64)
    np.add.at(counts, (predictor, target), 1)
    confusion = confusion_of(counts)
    assert confusion == Confusion(hits=77, false_alarms=7, misses=78, rejections=19_838)
    assert confusion.recall == pytest.approx(77 / 155)
    assert confusion.precision == pytest.approx(77 / 84)
    assert confusion.f1 == pytest.approx(2 * 77 / (84 + 155))
    assert confusion.false_positive_rate == pytest.approx(7 / 19_845)
    # The published code names the cells of this very table TN, FP, FN, TP: as if its rows were the
    # truth. What it prints as recall is the precision, and the reverse.
    _, named_false_positive, named_false_negative, hits = counts.ravel()
    assert hits / (hits + named_false_negative) == confusion.precision
    assert hits / (hits + named_false_positive) == confusion.recall
    # Two cells of its pictures of that model, in percent. They sum to the share memorized at the
    # end, which makes them hits and misses.
    both = 0.77255
    beside = 0.77309
    early, late, recall, precision, *_ = PUBLISHED["12b"]
    assert both + beside == pytest.approx(late, abs=5e-4)
    assert both / (both + beside) == pytest.approx(recall, abs=5e-3)
    assert both / early == pytest.approx(precision, abs=5e-3)


def test_correlations_of_a_table_of_counts_equal_those_of_the_rows(suite: Suite):
    one = suite[1]["14m"][200]
    other = suite[1]["1b"][200]
    counts = np.zeros((33, 33), np.int64)
    np.add.at(counts, (one, other), 1)
    assert score_correlation(counts) == pytest.approx(stats.pearsonr(one, other)[0])
    assert rank_correlation(counts) == pytest.approx(stats.spearmanr(one, other)[0])
    memorized = [(one == 32).astype(float), (other == 32).astype(float)]
    assert memorized_correlation(counts) == pytest.approx(np.corrcoef(*memorized)[0, 1])
    order = np.sort(one + other)[::-1]
    chosen = one + other >= order[199]
    top = top_of(counts, 0.1)
    assert top.sum() == chosen.sum() >= 200
    expected = np.corrcoef(one[chosen], other[chosen])[0, 1]
    assert score_correlation(top) == pytest.approx(expected)
    constant = np.zeros((33, 33), np.int64)
    constant[3, 1:5] = 7
    assert score_correlation(constant) is None and rank_correlation(constant * 0) is None


def test_the_slope_and_its_interval_equal_those_of_scipy():
    rng = np.random.default_rng(3)
    matches = rng.binomial(32, np.linspace(0.2, 0.4, 900))
    codes = (matches + 1).astype(np.uint8)
    codes[rng.random(900) < 0.3] = 0
    positions = Positions(900, 32, buckets=9)
    for first in range(0, 900, 128):
        positions.add(first, codes[first : first + 128])
    inside = np.flatnonzero(codes)
    line = stats.linregress(inside / 1e6, matches[inside] / 32)
    half = stats.t.ppf(0.975, len(inside) - 2) * line.stderr
    slope = positions.slope()
    assert slope is not None and slope.rows == len(inside)
    assert slope.per_million == pytest.approx(line.slope)
    assert slope.interval == pytest.approx((line.slope - half, line.slope + half), rel=1e-6)
    bucket = positions.data()[2]
    own = inside[(inside >= 200) & (inside < 300)]
    assert (bucket["first"], bucket["rows"]) == (200, len(own))
    scores = matches[own] / 32
    ends = stats.t.interval(0.95, len(own) - 1, scores.mean(), stats.sem(scores))
    assert (bucket["mean_low"], bucket["mean_high"]) == pytest.approx(ends)
    assert Positions(900, 32).slope() is None


def test_the_dispersion_test_and_the_quantiles_equal_a_count_of_the_windows():
    rng = np.random.default_rng(4)
    codes = rng.choice([5, 33], 64 * 300, p=[0.97, 0.03]).astype(np.uint8)
    codes[70] = 0
    counts = counts_in_windows(codes, 33, 64)
    by_hand = np.delete((codes.reshape(-1, 64) == 33).sum(axis=1), 1)
    assert counts.sum() == 299 and counts[4] == (by_hand == 4).sum()
    density = Density(64, counts)
    statistic = 298 * by_hand.var(ddof=1) / by_hand.mean()
    tails = (stats.chi2.cdf(statistic, 298), stats.chi2.sf(statistic, 298))
    assert density.rate == pytest.approx(by_hand.mean())
    assert density.dispersion == pytest.approx(by_hand.var(ddof=1) / by_hand.mean())
    assert density.p_value == pytest.approx(2 * min(tails))
    theory = stats.poisson.ppf((np.arange(299) + 0.5) / 299, by_hand.mean())
    points: dict[tuple[int, int], int] = {}
    for pair in zip(theory.astype(int).tolist(), np.sort(by_hand).tolist(), strict=True):
        points[pair] = points.get(pair, 0) + 1
    assert {(a, b): n for a, b, n in density.quantiles()} == points
    # Memorized rows in one place are no Poisson process.
    clustered = Density(64, np.array([290, 0, 0, 0, 0, 0, 0, 0, 9]))
    assert clustered.p_value is not None and clustered.p_value < 1e-9
    assert Density(64, np.array([5])).dispersion is None
    assert [window_of(rows) for rows in (100, 700, 16_383, 16_384, 10**8)] == [8, 16, 256, 512, 512]


def test_the_losses_of_each_score():
    rng = np.random.default_rng(5)
    matches = rng.integers(0, 5, 4000)
    loss = rng.gamma(2, 0.7, 4000)
    loss[:3] = np.nan
    losses = Losses(5)
    losses.add(matches[:2500], loss[:2500])
    losses.add(matches[2500:], loss[2500:])
    line = losses.data()[3]
    own = loss[(matches == 3) & np.isfinite(loss)]
    assert line["rows"] == (matches == 3).sum() and line["score"] == 0.75
    assert line["mean_loss"] == pytest.approx(own.mean())
    expected = np.quantile(own, [0.1, 0.5, 0.9])
    assert [line["loss_10"], line["loss_50"], line["loss_90"]] == pytest.approx(expected, abs=0.02)
    assert Losses(5).data()[0]["mean_loss"] is None


def test_a_study_of_three_sizes(suite: Suite, tmp_path: Path, monkeypatch):
    # Several parts, and batches of a file, as a large study has.
    monkeypatch.setattr(tables, "PART", 1024)
    monkeypatch.setattr(tables, "BATCH", 300)
    folder, made = suite
    files = open_scans([str(path) for path in sorted(folder.iterdir())])
    assert [file.name for file in files] == ["14m", "70m", "1b"]
    assert files[2].size == 1e9 and files[0].rows == {50: 500, 200: 2000}
    study = study_of(files, tmp_path)
    assert study.common == 500 and not study.notes and not list(tmp_path.iterdir())
    shares = {
        (line["model"], line["step"], line["selection"]): line for line in study.tables["shares"]
    }
    large = made["1b"][200]
    line = shares["1b", 200, "rows seen so far"]
    assert (line["rows"], line["memorized"]) == (2000, (large == 32).sum())
    assert line["mean_score"] == pytest.approx(large.mean() / 32)
    line = shares["1b", 200, "rows seen by all"]
    assert (line["rows"], line["memorized"]) == (500, (large[:500] == 32).sum())
    kinds = [line["kind"] for line in study.tables["predictions"]]
    # Each size early and late; three pairs of sizes at two checkpoints; two early small models.
    assert [kinds.count(kind) for kind in ("checkpoint", "size", "both")] == [3, 6, 2]
    early = made["14m"][50] == 32
    late = made["14m"][200][:500] == 32
    line = study.tables["predictions"][0]
    assert (line["predictor_step"], line["target_step"], line["rows"]) == (50, 200, 500)
    assert line["recall"] == pytest.approx((early & late).sum() / late.sum())
    assert line["precision"] == pytest.approx((early & late).sum() / early.sum())
    line = next(
        line
        for line in study.tables["correlations"]
        if (line["a"], line["b"], line["a_step"], line["b_step"]) == ("14m", "1b", 50, 200)
    )
    expected = np.corrcoef(made["14m"][50], made["1b"][200][:500])[0, 1]
    assert line["correlation"] == pytest.approx(expected) and line["rows"] == 500
    write_numbers(study, tmp_path)
    saved = json.loads((tmp_path / "memorization.json").read_text())
    assert saved["shares"] == study.tables["shares"] and saved["rows_seen_by_all"] == 500
    with (tmp_path / "slopes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert pq.read_table(tmp_path / "levels.parquet").num_rows == 6 * 33


def test_one_checkpoint_without_a_memorized_row_is_said_in_sentences(tmp_path: Path):
    # A name with signs of a pattern.
    path = scan_file(tmp_path / "tiny[1]*.parquet", scan_table({3: np.array([0, 5, 6, 1])}))
    study = study_of(open_scans([f"tiny={path}"]), tmp_path)
    text = " ".join(study.notes)
    assert "One model" in text and "One checkpoint of tiny" in text
    assert "No row is memorized by tiny at 3" in text
    assert study.tables["predictions"] == study.tables["densities"] == []
    write_numbers(study, tmp_path)
    assert "NaN" not in (tmp_path / "memorization.json").read_text()


def test_without_partial_scores_a_row_is_memorized_or_not(tmp_path: Path):
    matches = {2: np.array([32, 1, 32, 3] * 5), 4: np.array([32, 32, 2, 3] * 10)}
    nothing = pa.nulls(60, pa.float32())
    table = scan_table(matches, score=nothing, loss=nothing)
    study = study_of(open_scans([str(scan_file(tmp_path / "7m.parquet", table))]), tmp_path)
    assert not study.scored and "Partial scores of 7m" in study.notes[0]
    first = study.tables["shares"][0]
    assert (first["rows"], first["memorized"], first["mean_score"]) == (20, 10, 0.5)
    (line,) = study.tables["predictions"]
    assert (line["recall"], line["precision"]) == (0.5, 0.5)
    assert study.tables["levels"][0]["mean_loss"] is None


def test_seeds_are_paired_and_equal_sizes_predict_nothing(tmp_path: Path):
    for name, seed in (("14m", 0), ("14m-b", 1), ("70m", 0), ("70m-b", 1)):
        table = scan_table({9: np.array([32, 32, 3, 4] * 8)})
        scan_file(tmp_path / f"{name}.parquet", table, weight_seed=seed)
    files = open_scans([str(path) for path in sorted(tmp_path.iterdir())])
    lines = study_of(files, tmp_path).tables["predictions"]
    assert [(line["predictor"], line["target"]) for line in lines] == [
        ("14m", "70m"),
        ("14m-b", "70m-b"),
    ]


def test_files_that_do_not_compare_are_refused(tmp_path: Path):
    matches = np.array([32, 1, 2, 3])
    good = scan_file(tmp_path / "a.parquet", scan_table({2: matches}))

    def refused(error, text: str, *words: str | Path, steps: str | None = None) -> None:
        with pytest.raises(error, match=text):
            study_of(open_scans([str(word) for word in words], steps), tmp_path)

    other = scan_file(tmp_path / "b.parquet", scan_table({2: matches}), fingerprint="0" * 16)
    refused(DataError, "other data or another order", good, other)
    shorter = scan_table({2: matches}, prompt=np.full(4, 16, np.int32))
    refused(DataError, "prompts of 32 tokens", good, scan_file(tmp_path / "c.parquet", shorter))
    uneven = scan_table({2: matches}, prompt=np.array([32, 32, 16, 32], np.int32))
    refused(DataError, "several lengths", scan_file(tmp_path / "d.parquet", uneven))
    doubled = scan_table({2: matches}, index=np.array([0, 1, 1, 2]))
    refused(DataError, "1 rows twice", scan_file(tmp_path / "e.parquet", doubled))
    for value in (np.nan, 1.5, 0.49):
        wrong = scan_table({2: matches}, score=np.array([1, 1, 1, value], np.float32))
        refused(DataError, "1 of 4 scores", scan_file(tmp_path / "f.parquet", wrong))
    empty = scan_file(tmp_path / "g.parquet", scan_table({2: matches})[:0])
    refused(DataError, "has no row", empty)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "h.parquet")
    refused(DataError, "no scan of memorization", tmp_path / "h.parquet")
    (tmp_path / "i.parquet").write_bytes(good.read_bytes()[:300])
    refused(DataError, "damaged", tmp_path / "i.parquet")
    refused(ConfigError, "no file", tmp_path / "none.parquet")
    refused(ConfigError, "both named 'x'", f"x={good}", f"x={good}")
    far = scan_table({2: matches}, index=np.array([0, 1, 2, 10**15]))
    refused(CastaliaError, "need 909 TiB of disk", scan_file(tmp_path / "j.parquet", far))
    refused(CheckpointError, "no checkpoint of step 7; the nearest is 2", good, steps="2,7")


def test_the_share_memorized_by_how_often_the_data_repeat_a_text(tmp_path: Path):
    # Texts of 150 tokens, 1, 2 and 9 times, in rows of 96: some windows of 64 lie in one of them.
    texts = {letter * 149: copies for letter, copies in (("a", 1), ("b", 2), ("c", 9))}
    lines = [json.dumps({"text": text}) for text, copies in texts.items() for _ in range(copies)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines * 2))
    prefix = str(tmp_path / "texts")
    prepare(tmp_path / "texts.jsonl", prefix, "bytes", append_eod=True)
    words = ["debug", f"data.train={prefix}", "data.seq_length=96", "train.steps=4"]
    words += ["train.batch_size=4", "data.tokenizer=bytes", f"output={tmp_path / 'run'}"]
    stream = open_stream(words, lambda text: None)
    (block,) = stream.blocks(range(16))
    times = [copies for copies in texts.values() for _ in range(copies)] * 2
    whole = [spans[0].length >= 64 for spans in block.spans]
    assert True in whole and False in whole
    copies = [
        2 * times[spans[0].document] if inside else 0
        for spans, inside in zip(block.spans, whole, strict=True)
    ]
    doses = Doses(stream, 64).at(0, 16)
    assert doses.tolist() == [0 if not n else 1 + int(np.log2(n)) for n in copies]
    own = training_hash(stream.rows.fingerprint)
    table = scan_table({4: np.where(np.array(copies) > 4, 32, 3)})
    path = scan_file(tmp_path / "7m.parquet", table, own)
    study = study_of(open_scans([str(path)]), tmp_path, stream)
    shares = {line["copies"]: line["share"] for line in study.tables["doses"]}
    assert shares[16] == 1 and shares.get(2, 0) == shares.get(4, 0) == 0
    assert sum(line["rows"] for line in study.tables["doses"]) == np.count_nonzero(copies)
    other = open_scans([str(scan_file(path, table))])
    with pytest.raises(DataError, match="a scan of other rows than those of --stream"):
        study_of(other, tmp_path, stream)
    Path(f"{prefix}.documents.parquet").unlink()
    with pytest.raises(DataError, match="how often a document is repeated is unknown"):
        Doses(stream, 64)
