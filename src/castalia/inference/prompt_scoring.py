"""Reading prompts whose tokens are scored: each token once, also where several prompts begin alike.

The choices of a question, for instance, are prompts of one beginning, the stem. It is read and
scored in one slot, and its state is copied to the slots of the other prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from castalia.inference.engine import Slots
from castalia.inference.text import shared

STEM_TOKENS = 16
"""Shorter beginnings are read for each prompt: copying their state costs as much."""

Ids = Sequence[int]
Hear = Callable[[int, Tensor, int], None]
"""Called with the place of a prompt, logits (n, V) after n of its tokens, and the place of the
first of them."""


class Stem(NamedTuple):
    """What some prompts begin with."""

    prompts: list[int]
    """Their places."""
    length: int
    """Tokens that are read for all of them; all of a prompt that is alone."""


class Span(NamedTuple):
    """Tokens begin..end - 1 of one or several prompts, read in the slot of the first."""

    heard: list[int]
    """Places of the prompts."""
    begin: int
    end: int


def stems_of(prompts: Sequence[Ids]) -> list[Stem]:
    """Prompts in groups that begin alike, so that the fewest tokens are read twice."""
    # In the order of their tokens, those that begin alike are neighbours.
    order = sorted(range(len(prompts)), key=lambda place: list(prompts[place]))
    common = [0]
    for one, other in pairwise(prompts[place] for place in order):
        # Of each prompt one token is left: what follows it is asked for.
        common.append(min(shared(one, other), len(one) - 1, len(other) - 1))
    stems: list[Stem] = []
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or common[end] < STEM_TOKENS:
            stems += parted(prompts, order[begin:end], common[begin + 1 : end])[1]
            begin = end
    return stems


def parted(prompts: Sequence[Ids], order: list[int], common: list[int]) -> tuple[int, list[Stem]]:
    """Tokens that are not read, and the stems: of one group, or of the best groups of its halves.

    Takes   common: tokens that each of `order` but the last shares with the next.
    """
    if len(order) == 1:
        return 0, [Stem(order, len(prompts[order[0]]))]
    length = min(common)
    cut = common.index(length) + 1
    left, first = parted(prompts, order[:cut], common[: cut - 1])
    right, second = parted(prompts, order[cut:], common[cut:])
    together = length * (len(order) - 1)
    if together > left + right:
        return together, [Stem(order, length)]
    return left + right, first + second


def score_prompts(
    slots: Slots, places: Sequence[int], prompts: Sequence[Ids], hear: Hear
) -> list[Tensor]:
    """Read prompts into empty slots; logits (V,) after each. `hear` gets all logits on the way."""
    stems = stems_of(prompts)
    ends: dict[int, Tensor] = {}

    def read(spans: Sequence[Span]) -> None:
        tokens = [prompts[span.heard[0]][span.begin : span.end] for span in spans]
        fed = slots.feed_from([places[span.heard[0]] for span in spans], tokens, [0] * len(spans))
        for row, start, logits in by_row(fed, [len(ids) for ids in tokens]):
            first = spans[row].begin + start
            for place in spans[row].heard:
                hear(place, logits, first)
                # The engine may reuse the memory in the next pass.
                if first + len(logits) == len(prompts[place]):
                    ends[place] = logits[-1].clone()

    read([Span(stem.prompts, 0, stem.length) for stem in stems])
    rest = []
    for stem in stems:
        for place in stem.prompts[1:]:
            slots.copy(places[stem.prompts[0]], places[place], stem.length)
        if len(stem.prompts) > 1:
            rest += [Span([place], stem.length, len(prompts[place])) for place in stem.prompts]
    if rest:
        read(rest)
    return [ends[place] for place in range(len(prompts))]


def by_row(parts: Iterator[Tensor], counts: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Parts (n, V) of rows of `counts` positions, one row after the other, cut at their ends.

    Yields  the row, the place in it of the first position, and the logits.
    """
    row = 0
    start = 0
    for part in parts:
        at = 0
        while at < len(part):
            taken = part[at : at + counts[row] - start]
            yield row, start, taken
            at += len(taken)
            start += len(taken)
            if start == counts[row]:
                row += 1
                start = 0
