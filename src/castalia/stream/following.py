"""What follows a text in the token files of a run: counts of the next token."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from castalia.stream.index.search import Search
from castalia.stream.opening import Stream
from castalia.stream.tracing import forms_of, open_searches


def continuations(
    stream: Stream,
    text: str | None = None,
    *,
    ids: Sequence[int] | None = None,
    most: int = 10,
    index_folder: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The likeliest ids behind a text, by their counts in the token files of a run's sources.

    A text that is in none of them gives way to its longest end that is.
    Returns  `ids`, those whose continuations were counted, and their `text`; `asked`, the number of
             ids of the whole text; `count`, the continuations; `next`, `most` dicts of id, text,
             count and share. Texts are None without a tokenizer.
    Raises   as `castalia.stream.trace`.
    Source   infini-gram and its ∞-gram back-off, Liu et al. 2024, arXiv:2401.17377.
    """
    (form,) = forms_of(stream, text, ids, exact=True)
    searches = list(open_searches(stream, index_folder).values())
    context = longest_context(searches, list(form.ids))
    counts = following(searches, context)
    while context and not counts:
        # It stands at the ends of documents only.
        context = context[1:]
        counts = following(searches, context)
    total = counts.total()
    tokenizer = stream.tokenizer

    def decoded(numbers: Sequence[int]) -> str | None:
        if tokenizer is None:
            return None
        return tokenizer.decode(numbers)

    return {
        "ids": context,
        "text": decoded(context),
        "asked": len(form.ids),
        "count": total,
        "next": [
            {"id": number, "text": decoded([number]), "count": count, "share": count / total}
            for number, count in counts.most_common(most)
        ],
    }


def longest_context(searches: Sequence[Search], ids: list[int]) -> list[int]:
    """The longest end of `ids` that is in one of the token files."""
    return max((search.longest_suffix(ids) for search in searches), key=len, default=[])


def following(searches: Sequence[Search], ids: list[int]) -> Counter[int]:
    """How often each id follows `ids` in the token files."""
    counts: Counter[int] = Counter()
    for search in searches:
        counts.update(search.following(ids))
    return counts
