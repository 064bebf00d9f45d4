"""Whether checkpoints lie on their way in the order of their steps, judged by distances alone.

Training moves weights along a path, so the nearest checkpoints of each are its neighbours in step.
The statements compare distances with each other, never with a number of their own: they hold for
any learning rate, spacing and dtype. A factor leaves room for the estimate's error and for weights
that only wander around one place at the end of training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.float64]

ELSEWHERE = 0.6
"""A checkpoint is misplaced if another one is nearer than this share of the distance to its
neighbours. A walk without direction has 0.71 for a swap by one place; noise around one place,
against its average, 0.71 too."""
DETOUR = 1.5
"""A checkpoint is off the way if both its neighbours are farther from it, by this factor, than from
each other."""
EXCHANGED = 1.25
"""Two neighbours are exchanged if the way through them is longer by this factor than the way with
the two exchanged; a walk without direction has 1.41, and 0.71 in the right order."""
FAR = 2.0
"""The last checkpoint is off the way if it lies farther from its neighbour, by this factor, than
any other checkpoint does."""
LEAST = 4
"""Checkpoints below which no order can be judged."""


class Misplaced(NamedTuple):
    """A checkpoint that lies elsewhere than its step says."""

    place: int
    nearest: tuple[int, ...]
    """The checkpoints that are nearest to it, in order of step; empty if none is near."""


def misplaced(distances: Distances) -> list[Misplaced]:
    """The checkpoints out of order, by their place in the table.

    Takes   distances (N, N) between N checkpoints in order of step, no two of them equal.
    """
    found = [place for pair in exchanged(distances) for place in pair]
    # Without both: where one alone is left out, the other one fits.
    left = [place for place in range(len(distances)) if place not in found]
    while len(left) >= LEAST:
        # The worst first: beside a misplaced one its neighbours look odd as well.
        scores = [oddness(distances, left, number) for number in range(len(left))]
        worst = int(np.argmax(scores))
        if scores[worst] <= 1:
            break
        found.append(left.pop(worst))
    right = [place for place in range(len(distances)) if place not in found]
    return [Misplaced(place, nearest_to(distances, place, right)) for place in sorted(found)]


def oddness(distances: Distances, order: Sequence[int], number: int) -> float:
    """By how much one checkpoint contradicts its place in `order`; above 1 it is misplaced."""
    place = order[number]
    # The first and the last checkpoint have one neighbour.
    beside = [order[near] for near in (number - 1, number + 1) if 0 <= near < len(order)]
    others = [each for each in order if each != place and each not in beside]
    to_beside = min(distances[place, each] for each in beside)
    to_others = min(distances[place, each] for each in others)
    # First statement: another checkpoint is much nearer than the neighbours in step.
    odd = ratio(ELSEWHERE * to_beside, to_others)
    if len(beside) == 2:
        # Second: the neighbours are much nearer to each other than to this one.
        between = distances[beside[0], beside[1]]
        odd = max(odd, ratio(to_beside, DETOUR * between))
    elif number:
        # Third, for the last one alone: the first is the initialization, far from all others.
        (neighbour,) = beside
        reach = max(distances[neighbour, each] for each in others)
        odd = max(odd, ratio(to_beside, FAR * reach))
    return odd


def ratio(one: float, other: float) -> float:
    """one / other; infinite over 0, and 0 for 0 / 0."""
    if other > 0:
        return float(one / other)
    if one > 0:
        return float("inf")
    return 0.0


def exchanged(distances: Distances) -> list[tuple[int, int]]:
    """Neighbours that stand in each other's places."""
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    # Pairs with a neighbour on either side; at the ends there is no way to compare.
    for one in range(1, len(distances) - 2):
        before = one - 1
        other = one + 1
        after = one + 2
        way = distances[before, one] + distances[other, after]
        way_exchanged = distances[before, other] + distances[one, after]
        if one in taken or way <= EXCHANGED * way_exchanged:
            continue
        order = list(range(len(distances)))
        order[one] = other
        order[other] = one
        # Else one of them belongs elsewhere, and the other one is in its place.
        if max(oddness(distances, order, one), oddness(distances, order, other)) <= 1:
            pairs.append((one, other))
            taken |= {one, other}
    return pairs


def nearest_to(distances: Distances, place: int, others: Sequence[int]) -> tuple[int, ...]:
    """The two nearest of `others`, ascending; none where all are about equally far."""
    away = sorted(others, key=lambda each: distances[place, each])
    if len(away) < 2:
        return tuple(away)
    # Weights of another model are about equally far from every checkpoint of this one.
    middle = float(np.median([distances[place, each] for each in others]))
    if distances[place, away[0]] > ELSEWHERE * middle:
        return ()
    return tuple(sorted(away[:2]))


def rightful(distances: Distances, members: Sequence[int]) -> list[int]:
    """Which of several checkpoints with equal weights they may belong to: the one nearest to its
    neighbours, or several between the same neighbours, which have the same claim.

    Takes   distances (N, N), equal rows for the members.
    """
    others = [place for place in range(len(distances)) if place not in members]
    costs: dict[int, float] = {}
    for member in members:
        before = [place for place in others if place < member][-1:]
        after = [place for place in others if place > member][:1]
        costs[member] = max((float(distances[member, p]) for p in before + after), default=0.0)
    least = min(costs.values())
    return [member for member in members if costs[member] == least]
