"""Work of an evaluation over several ranks: each item is computed on one of them."""

import hashlib
import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from castalia.core.errors import CastaliaError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def only_part(part: Any) -> list[Any]:
    """The gather of a single rank."""
    return [part]


class Share(NamedTuple):
    """This rank's place among the ranks that evaluate together.

    Every rank builds the same items in the same order, computes those that `deal` gives it, and
    gets the answers of all. An item therefore counts once, on any number of ranks.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = only_part
    """Takes a picklable object of this rank; returns those of all ranks, in their order. Every rank
    calls it equally often, as `torch.distributed.all_gather_object`."""

    def compute(
        self,
        items: Sequence[Item],
        function: Callable[[list[Item]], list[Answer]],
        *,
        together: Callable[[Item], Hashable],
        cost: Callable[[Item], int],
    ) -> list[Answer]:
        """`function` over all items, in their order; each rank calls it with its own items once.

        Takes   function: items to as many answers, which do not depend on the other items.
                together: items with an equal key go to the same rank, such as those that share a
                computation. cost: what decides which rank gets an item, in any unit.
        Raises  the error of this rank's call; CastaliaError if the call of another rank failed, or
                the ranks have different items.
        """
        own = self.deal(items, together, cost)[self.rank]
        if self.size == 1:
            return function(list(items))
        answers: list[Answer] = []
        failure: Exception | None = None
        try:
            answers = function([items[i] for i in own])
        except Exception as error:  # the other ranks wait in `gather` and have to hear of it
            failure = error
        text = None
        if failure is not None:
            text = repr(failure)
        parts = self.gather((digest_of(items), own, answers, text))
        if failure is not None:
            raise failure
        # Answers to other items would be numbers like any other.
        if len({digest for digest, *_ in parts}) > 1:
            raise CastaliaError(
                "the ranks of the evaluation ask for different things; a task whose documents or"
                " texts depend on the order of a set or the time of day is evaluated on one rank,"
                " or with PYTHONHASHSEED=0 on all"
            )
        placed: dict[int, Answer] = {}
        for rank, (_, places, given, text) in enumerate(parts):
            if text is not None:
                raise CastaliaError(f"rank {rank} of the evaluation failed: {text}")
            placed.update(zip(places, given, strict=True))
        return [placed[i] for i in range(len(items))]

    def deal(
        self,
        items: Sequence[Item],
        together: Callable[[Item], Hashable],
        cost: Callable[[Item], int],
    ) -> list[list[int]]:
        """Places of the items of each rank, ascending; the same on every rank."""
        groups: dict[Hashable, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(together(item), []).append(place)
        costs = {key: sum(cost(items[i]) for i in places) for key, places in groups.items()}
        # The dearest group first, each to the rank with the least so far. Ties follow the order of
        # the items, which is the same on every rank.
        ranks = [(0, rank) for rank in range(self.size)]
        dealt: list[list[int]] = [[] for _ in range(self.size)]
        for key in sorted(groups, key=lambda key: -costs[key]):
            total, rank = heapq.heappop(ranks)
            dealt[rank] += groups[key]
            heapq.heappush(ranks, (total + costs[key], rank))
        return [sorted(places) for places in dealt]


def digest_of(items: Iterable[object]) -> str:
    """SHA-256 of items by their texts, the same in every process for equal ones."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


ALONE = Share()
"""One rank computes everything."""
