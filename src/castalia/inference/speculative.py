"""Speculative decoding: cheap guesses, checked by the model several at a time.

A draft proposes k tokens; the model reads them in one pass and keeps those that it would have made itself. Greedy text
is the model's own; drawn text has exactly its distribution: a guess x of the draft's distribution q is kept with
probability min(1, p(x) / q(x)), and what takes the place of the first that is not is drawn from max(0, p - q).

Source  Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318. Prompt look-up: a
        guess without a model is what followed the last tokens the time before (Saxena 2023).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.decoding import Completion, Row
from castalia.inference.engine import Engine, Slots
from castalia.inference.language_model import Drawing, LanguageModel, split_options
from castalia.inference.sampling import Sampling, distribution

GUESSES = 5
"""Tokens that a draft proposes at a time."""
LOOKUP_TOKENS = 3
"""Prompt look-up compares at most this many last tokens."""


@dataclass
class Tally:
    """How the guesses of one text went."""

    guessed: int = 0
    kept: int = 0
    passes: int = 0
    """Passes of the large model over guesses."""

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were kept."""
        return self.kept / max(1, self.guessed)


class Draft(ABC):
    """What proposes tokens."""

    @abstractmethod
    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """At most `count` tokens after `ids`, and the distribution (V,) each was drawn from; None for a certain one."""


class ModelDraft(Draft):
    """A smaller model of the same suite."""

    def __init__(
        self, engine: Engine, sampling: Sampling, generator: torch.Generator, length: int
    ) -> None:
        self.engine, self.sampling, self.generator = engine, sampling, generator
        self.slots = engine.slots(1, length)
        self.read: list[int] = []

    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """See `Draft`. What was read of an earlier guess that the model did not keep is forgotten."""
        common = 0
        while common < min(len(self.read), len(ids) - 1) and self.read[common] == ids[common]:
            common += 1
        self.slots.copy(0, 0, common)
        self.read = list(ids)
        news, guesses, chances = list(ids[common:]), [], []
        for _ in range(count):
            logits = self.slots.feed([0], [news])[0, : self.engine.config.vocab_size]
            token, chance = draw(logits, self.sampling, self.generator)
            guesses.append(token)
            chances.append(chance)
            news = [token]
        self.read += guesses[:-1]  # the last one was not read
        return guesses, chances


class LookupDraft(Draft):
    """What followed the last tokens when they stood in the text before."""

    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """See `Draft`; the longest match counts, and of equals the latest."""
        ids = list(ids)
        for size in range(min(LOOKUP_TOKENS, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == tail:
                    found = ids[start + size : start + size + count]
                    return found, [None] * len(found)
        return [], []


def draw(
    logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[int, Tensor | None]:
    """A token from logits (V,) and its distribution; greedy ones have none."""
    if sampling.temperature == 0:
        return int(logits.argmax()), None
    chance = distribution(logits[None], sampling)[0]
    return int(torch.multinomial(chance, 1, generator=generator)), chance


def judge(
    logits: Tensor,
    guesses: Sequence[int],
    chances: Sequence[Tensor | None],
    sampling: Sampling,
    generator: torch.Generator,
) -> list[int]:
    """The tokens that a text goes on with: the guesses that are kept, and one of the model's own.

    Shapes  logits (len(guesses) + 1, V): row i is the model's view after i guesses.
    """
    kept: list[int] = []
    for row, guess, q in zip(logits, guesses, chances, strict=False):
        if sampling.temperature == 0:
            best = int(row.argmax())
            kept.append(best)
            if best != guess:
                return kept
            continue
        p = distribution(row[None], sampling)[0]
        sure = float(p[guess]) / float(q[guess]) if q is not None else float(p[guess])
        if float(torch.rand((), generator=generator, device=generator.device)) < sure:
            kept.append(guess)
            continue
        rest = (
            (p - q).clamp_(min=0)
            if q is not None
            else p.index_fill(0, torch.tensor(guess, device=p.device), 0.0)
        )
        rest = rest if float(rest.sum()) > 0 else p  # p and q may be the same up to rounding
        return [*kept, int(torch.multinomial(rest, 1, generator=generator))]
    return [*kept, draw(logits[len(guesses)], sampling, generator)[0]]


def speculate(
    engine: Engine,
    draft: Draft,
    row: Row,
    sampling: Sampling,
    generator: torch.Generator,
    tally: Tally,
    guesses: int = GUESSES,
) -> Iterator[str]:
    """Continue one row to its end; yields the certain text after each pass of the model."""
    V = engine.config.vocab_size
    slots: Slots = engine.slots(1, len(row.ids) + row.budget + guesses + 1)
    ids = list(row.ids)
    token, _ = draw(slots.feed([0], [ids])[0, :V], sampling, generator)
    yield row.push(token)
    while row.finish_reason is None:
        ids.append(token)
        wanted = min(guesses, row.budget - len(row.tokens) - 1)
        guessed, chances = draft.guess(ids, wanted) if wanted > 0 else ([], [])
        logits = slots.feed_all(0, [token, *guessed])[:, :V]
        made = judge(logits, guessed, chances, sampling, generator)
        tally.guessed += len(guessed)
        tally.kept += len(made) - 1
        tally.passes += 1
        slots.copy(0, 0, len(ids) + len(made) - 1)
        ids += made[:-1]
        token = made[-1]
        text = ""
        for each in made:
            text += row.push(each)
            if row.finish_reason is not None:
                break
        yield text
    row.seconds = time.perf_counter() - row.started


def speculative_complete(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    *,
    draft: "LanguageModel | str",
    guesses: int = GUESSES,
    **options: object,
) -> list[tuple[Completion, Tally]]:
    """As `LanguageModel.complete`, one prompt at a time, with the guesses of `draft`: a model, or "lookup".

    Greedy text is that of `complete`. Drawn text has the same distribution, but not the same draws.
    Raises  ConfigError if the draft has another vocabulary, or `guesses` is not positive.
    """
    require_draft(model, draft, guesses)
    sampling, stop = split_options(Drawing(**options))  # type: ignore[typeddict-item]
    done = []
    for place, prompt in enumerate(prompts):
        row, tally = model.row(prompt, max_new_tokens, stop), Tally()
        (generator,) = sampling.after(place).generators(1, model.engine.device)
        helper: Draft = LookupDraft()
        if isinstance(draft, LanguageModel):
            length = min(
                draft.config.max_position_embeddings, len(row.ids) + row.budget + guesses + 1
            )
            helper = ModelDraft(draft.engine, sampling, generator, length)
        for _ in speculate(model.engine, helper, row, sampling, generator, tally, guesses):
            pass
        done.append((row.completion(), tally))
    return done


def require_draft(model: LanguageModel, draft: LanguageModel | str, guesses: int) -> None:
    """Raises  ConfigError if the draft cannot speak for the model."""
    if guesses < 1:
        raise ConfigError(f"a draft proposes at least one token at a time, got {guesses}")
    if isinstance(draft, str):
        if draft != "lookup":
            raise ConfigError(f"no draft {draft!r}; have: lookup, or a model")
        return
    ours, theirs = model.tokenizer, draft.tokenizer
    same = ours is not None and theirs is not None and ours.ids == theirs.ids
    if draft.config.vocab_size != model.config.vocab_size or (
        ours is not None and theirs is not None and not same
    ):
        raise ConfigError(
            f"the draft has another vocabulary ({draft.config.vocab_size} tokens) than the model"
            f" ({model.config.vocab_size}); take a model of the same suite"
        )
    if draft.config.max_position_embeddings < model.config.max_position_embeddings:
        raise ConfigError(
            f"the draft reads {draft.config.max_position_embeddings} tokens and the model"
            f" {model.config.max_position_embeddings}; take one that reads as many"
        )
