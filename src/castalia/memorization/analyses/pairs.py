"""Which scans are compared, and what a comparison says."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from castalia.memorization.analyses.joint import (
    TOP,
    Counts,
    confusion_of,
    memorized_correlation,
    rank_correlation,
    score_correlation,
    top_of,
)
from castalia.memorization.analyses.table import Scan

Pair = tuple[int, int]
"""Places of two scans in the table, the predictor first."""


def pairs_of(scans: Sequence[Scan]) -> list[Pair]:
    """Scans to compare: those of one file, those of one checkpoint, and each with the reference."""
    chosen = {
        (one, other)
        for one, other in combinations(range(len(scans)), 2)
        if scans[one].file is scans[other].file or scans[one].step == scans[other].step
    }
    # The last checkpoint of the largest model, which every scan may predict.
    reference = reference_of(scans)
    chosen |= {(number, reference) for number in range(reference)}
    return sorted(chosen)


def reference_of(scans: Sequence[Scan]) -> int:
    """The last checkpoint of the largest model: files are in the order of their size."""
    return len(scans) - 1


def predictions(scans: Sequence[Scan], joints: Mapping[Pair, Counts]) -> list[dict[str, Any]]:
    """What early checkpoints and small models say of late and large ones.

    Only rows that both have seen count.
    """
    lines = []
    for (one, other), counts in joints.items():
        kind = kind_of(scans, one, other)
        if kind and counts.sum():
            lines.append(prediction(kind, scans[one], scans[other], counts))
    return lines


def kind_of(scans: Sequence[Scan], one: int, other: int) -> str:
    """The question that a pair answers; "" for a pair of the heat maps alone."""
    early = scans[one]
    late = scans[other]
    if early.file is late.file:
        if late.step == late.file.steps[-1]:
            return "checkpoint"
        return ""
    # Without sizes, or between seeds of one size, neither is the small model.
    if early.file.size == late.file.size or None in (early.file.size, late.file.size):
        return ""
    if not seeds_match(scans, early, late):
        return ""
    if early.step == late.step:
        return "size"
    if other == reference_of(scans):
        return "both"
    return ""


def seeds_match(scans: Sequence[Scan], one: Scan, other: Scan) -> bool:
    """Whether two models have one seed, or the larger has no run with the seed of the smaller."""
    seed = one.file.weight_seed
    seeds = {scan.file.weight_seed for scan in scans if scan.file.size == other.file.size}
    return seed == other.file.weight_seed or seed not in seeds


def prediction(kind: str, one: Scan, other: Scan, counts: Counts) -> dict[str, Any]:
    """One line of the table."""
    confusion = confusion_of(counts)
    recall = confusion.recall_interval() or (None, None)
    precision = confusion.precision_interval() or (None, None)
    return {
        "kind": kind,
        "predictor": one.file.name,
        "predictor_step": one.step,
        "target": other.file.name,
        "target_step": other.step,
        "rows": confusion.rows,
        "true_positives": confusion.hits,
        "false_positives": confusion.false_alarms,
        "false_negatives": confusion.misses,
        "true_negatives": confusion.rejections,
        "recall": confusion.recall,
        "recall_low": recall[0],
        "recall_high": recall[1],
        "precision": confusion.precision,
        "precision_low": precision[0],
        "precision_high": precision[1],
        "f1": confusion.f1,
        "false_positive_rate": confusion.false_positive_rate,
    }


def correlations(scans: Sequence[Scan], joints: Mapping[Pair, Counts]) -> list[dict[str, Any]]:
    """Correlations of two scans over the rows that both have seen, by selection of rows."""
    lines = []
    for (one, other), counts in joints.items():
        a = scans[one]
        b = scans[other]
        names = {"a": a.file.name, "a_step": a.step, "b": b.file.name, "b_step": b.step}
        for rows, part, measure, value in measures(counts):
            lines.append(
                {
                    **names,
                    "selection": rows,
                    "measure": measure,
                    "rows": int(part.sum()),
                    "correlation": value,
                }
            )
    return lines


def measures(counts: Counts) -> list[tuple[str, Counts, str, float | None]]:
    """Selection, its rows, name of the correlation, its value."""
    made: list[tuple[str, Counts, str, float | None]] = [
        ("all rows", counts, "pearson", score_correlation(counts)),
        ("all rows", counts, "spearman", rank_correlation(counts)),
        # The score itself is constant among memorized rows: what correlates is being one.
        ("memorized or not", counts, "pearson", memorized_correlation(counts)),
    ]
    for name, share in TOP.items():
        top = top_of(counts, share)
        made.append((name, top, "pearson", score_correlation(top)))
        made.append((name, top, "spearman", rank_correlation(top)))
    return made
