"""Texts that are continued together to their ends, by draws or by beam searches."""

from collections.abc import Iterator, Sequence

from castalia.inference.batching import Admission, Batcher, raise_first
from castalia.inference.beams import BeamSearch, Search
from castalia.inference.decoding import Completion, Continuation
from castalia.inference.engine import Engine
from castalia.inference.sampling import Sampling


def decode_texts(
    engine: Engine, texts: Sequence[Continuation], sampling: Sampling
) -> Iterator[list[str]]:
    """Continue all texts to their ends; yields the new piece of each after every token.

    The piece of a finished text is empty.
    Raises  the error of a text whose steering fails.
    """
    batcher = Batcher(engine, len(texts), max(len(text.ids) + text.budget for text in texts))
    generators = sampling.generators(len(texts), engine.device)
    news = []
    for text, generator in zip(texts, generators, strict=True):
        news.append(Admission(text, sampling, generator))
    # The batcher gives out its slots in order, so text i is in slot i.
    first = batcher.admit(news)
    raise_first(news)
    yield first
    while batcher.running:
        pieces = batcher.step()
        raise_first(news)
        yield [pieces.get(slot, "") for slot in range(len(texts))]


def search_texts(
    engine: Engine, texts: Sequence[Continuation], sampling: Sampling, search: Search
) -> list[Completion]:
    """The best texts of each prompt by a beam search; those of a prompt follow one another.

    Raises  the error of the first search that fails.
    """
    length = max(len(text.ids) + text.budget for text in texts)
    batcher = Batcher(engine, len(texts) * search.num_beams, length)
    generators = sampling.generators(len(texts), engine.device)
    searches = [
        BeamSearch(text, sampling, search, generator)
        for text, generator in zip(texts, generators, strict=True)
    ]
    batcher.admit_searches(searches)
    while batcher.searches:
        batcher.step()
    return [completion for one in searches for completion in one.completions()]
