"""Arithmetic of the mixing benchmark: metrics, iterations saved, and the spread of chance.

M1  mean of the held-out losses of the sources
M1' mean of their perplexities (as in ODM's paper)
M2  mean weighted by the training tokens of the sources
M3  largest distance on any source from the best arm on it
M4  mean loss of the sources that no arm trained on
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Result = dict[str, Any]


def metrics(result: Result, natural: Floats, best: Floats) -> dict[str, float]:
    """All metrics of a finished run.

    natural  (K,) shares by tokens. best: (K,) lowest loss of any arm, nats a byte.
    """
    losses = final(result)
    return {
        "M1": float(losses.mean()),
        "M1 ppl": float(np.exp(losses).mean()),
        "M2": float(losses @ natural),
        "M3": float((losses - best).max()),
        "M4": float(np.mean(result["outside"])),
    }


def final(result: Result) -> Floats:
    """Losses of the sources at the end, (K,)."""
    return np.array(result["curve"][-1][1:])


def curve(result: Result, weights: Floats) -> tuple[Floats, Floats]:
    """Steps, and the weighted held-out loss as a non-increasing curve (isotonic regression)."""
    table = np.array(result["curve"])
    return table[:, 0], falling(table[:, 1:] @ weights)


def perplexity_curve(result: Result) -> tuple[Floats, Floats]:
    """Steps, and the mean perplexity of the sources (M1') as a non-increasing curve."""
    table = np.array(result["curve"])
    return table[:, 0], falling(np.exp(table[:, 1:]).mean(1))


def falling(values: Floats) -> Floats:
    """The nearest non-increasing sequence by least squares, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean = float(value)
        count = 1
        while blocks and blocks[-1][0] < mean:
            before, more = blocks.pop()
            mean = (mean * count + before * more) / (count + more)
            count += more
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def crossing(steps: Floats, losses: Floats, goal: float) -> float | None:
    """The step at which a falling curve reaches `goal`; None if it does not.

    Interpolates linearly in the logarithm of the step.
    """
    if losses[-1] > goal:
        return None
    at = int(np.argmax(losses <= goal))
    if at == 0:
        return float(steps[0])
    fraction = (losses[at - 1] - goal) / (losses[at - 1] - losses[at])
    return float(np.exp(np.log(steps[at - 1]) + fraction * np.log(steps[at] / steps[at - 1])))


def saved(arm: Result, base: Result, weights: Floats) -> float:
    """S = 1 - t*/T: t* is the step at which the arm reaches the base's final loss, T a run's steps.

    If the arm never reaches it, -S of the base against the arm.
    """
    return saved_by(curve(arm, weights), curve(base, weights))


def saved_by(arm: tuple[Floats, Floats], base: tuple[Floats, Floats]) -> float:
    """S of two falling curves, each its steps and its losses."""
    steps, losses = arm
    base_steps, base_losses = base
    reached = crossing(steps, losses, base_losses[-1])
    if reached is not None:
        return 1 - reached / base_steps[-1]
    reverse = crossing(base_steps, base_losses, losses[-1])
    assert reverse is not None, "one of two curves ends below the other"
    return -(1 - reverse / steps[-1])


def saved_of_means(
    arm: Mapping[str, Any], base: Mapping[str, Any], metric: str, draws: int = 2000
) -> dict[str, float] | None:
    """S of the mean curves of two arms, with a 95% interval; None without curves on the metric.

    arm, base   rows of a results file: `curves`, means over the seeds, and `by_seed`, their ends.
    metric      M1, "M1 ppl" or M2.
    For files without `against_natural`, which have no curve of a single seed. The interval
    bootstraps over the seeds, for both arms together; a draw moves the mean curve by what its seeds
    are off at the end. That leaves out how else their curves differ, so it is too narrow.
    """
    if metric not in arm["curves"] or metric not in base["curves"]:
        return None
    steps, losses = np.array(arm["curves"][metric])
    base_curve = tuple(np.array(base["curves"][metric]))
    ends = {str(seed): value for seed, value in arm["by_seed"][metric].items()}
    base_ends = {str(seed): value for seed, value in base["by_seed"][metric].items()}
    gaps = np.array([ends[seed] - base_ends[seed] for seed in ends if seed in base_ends])
    drawn = np.random.default_rng(0).choice(gaps - gaps.mean(), (draws, len(gaps))).mean(axis=1)
    values = [saved_by((steps, losses + off), base_curve) for off in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "saved": saved_by((steps, losses), base_curve),
        "low": float(low),
        "high": float(high),
    }


def bootstrap(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95% interval of the median, by bootstrapping over the seeds."""
    drawn = np.random.default_rng(0).choice(np.array(values), (draws, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def saved_by_seed(
    arm: Mapping[int, Result],
    base: Mapping[int, Result],
    curve_of: Callable[[Result], tuple[Floats, Floats]],
) -> dict[str, Any]:
    """S of every seed that both arms have, their median, and its 95% interval."""
    seeds = sorted(arm.keys() & base.keys())
    by_seed = [saved_by(curve_of(arm[seed]), curve_of(base[seed])) for seed in seeds]
    low, high = bootstrap(by_seed)
    return {
        "saved": float(np.median(by_seed)),
        "low": low,
        "high": high,
        "by_seed": dict(zip(seeds, by_seed, strict=True)),
    }


def against(
    arm: Mapping[int, Result], base: Mapping[int, Result], weights: Floats
) -> dict[str, Any]:
    """Iterations saved (with a 95% interval) and nats gained: medians and values by seed."""
    seeds = sorted(arm.keys() & base.keys())
    gained = [float((final(base[s]) - final(arm[s])) @ weights) for s in seeds]
    return saved_by_seed(arm, base, lambda result: curve(result, weights)) | {
        "nats": float(np.median(gained)),
        "nats_by_seed": dict(zip(seeds, gained, strict=True)),
    }


def noise_floor(runs: Mapping[int, Result], weights: Floats) -> dict[str, float]:
    """Spread of S over all ordered pairs of seeds of one arm, where the true S is 0."""
    values = [saved(runs[a], runs[b], weights) for a, b in itertools.permutations(sorted(runs), 2)]
    low, high = np.quantile(values, [0.05, 0.95])
    return {"median": float(np.median(np.abs(values))), "low": float(low), "high": float(high)}


def best_arm(
    arms: Mapping[str, Mapping[int, Result]], names: Sequence[str], weigh: Callable[[Result], float]
) -> str:
    """The arm with the lowest mean over the seeds."""
    return min(
        names, key=lambda name: float(np.mean([weigh(result) for result in arms[name].values()]))
    )
