"""Speculative decoding: cheap guesses, checked by the model several at a time.

A draft proposes k tokens. The model reads them in one pass and keeps those that it would have
produced itself. Greedy text is the model's own. Drawn text has exactly the model's distribution: a
guess x from the draft's distribution q is kept with probability min(1, p(x) / q(x)), and the token
in place of the first rejected one is drawn from max(0, p - q).

Source  Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318.
        Prompt look-up, a guess without a model: the tokens that followed the last few tokens the
        time before (Saxena 2023).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.decoding import Completion, Continuation
from castalia.inference.engine import Engine
from castalia.inference.language_model import LanguageModel
from castalia.inference.options import Drawing
from castalia.inference.sampling import Sampling, distribution
from castalia.inference.steering import steering_of
from castalia.inference.text import shared

GUESSES = 5
"""Tokens that a draft proposes at a time."""
LOOKUP_TOKENS = 3
"""Prompt look-up compares at most this many of the last tokens."""


@dataclass
class GuessCounts:
    """Outcome of the guesses of one text."""

    guessed: int = 0
    kept: int = 0
    passes: int = 0
    """Passes of the large model over guesses."""


class Draft(ABC):
    """Proposes tokens."""

    @abstractmethod
    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """At most `count` tokens after `ids`, and the distribution (V,) each was drawn from.

        The distribution of a certain guess is None.
        """


class ModelDraft(Draft):
    """A smaller model of the same suite."""

    def __init__(
        self,
        engine: Engine,
        text: Continuation,
        sampling: Sampling,
        generator: torch.Generator,
        length: int,
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.generator = generator
        # The model's bans and penalties: a guess that it must reject would be wasted.
        self.steering = steering_of(sampling, text)
        self.prompt = len(text.ids)
        self.slots = engine.slots(1, length)
        self.read: list[int] = []

    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """See `Draft`. The slot is first cut back past guesses that the model did not keep."""
        # At least one token is read: its logits are what the first guess is drawn from.
        common = min(shared(self.read, ids), len(ids) - 1)
        self.slots.copy(0, 0, common)
        self.read = list(ids)
        unread = list(ids[common:])
        guesses: list[int] = []
        chances: list[Tensor | None] = []
        for _ in range(count):
            logits = self.slots.feed([0], [unread])[0, : self.engine.config.vocab_size]
            if self.steering is not None:
                logits = self.steering(logits, [*ids[self.prompt :], *guesses])
            token, chance = draw(logits, self.sampling, self.generator)
            guesses.append(token)
            chances.append(chance)
            unread = [token]
        # The last guess was drawn but never read.
        self.read += guesses[:-1]
        return guesses, chances


class LookupDraft(Draft):
    """The tokens that followed an earlier occurrence of the last few tokens of the text."""

    def guess(self, ids: Sequence[int], count: int) -> tuple[list[int], list[Tensor | None]]:
        """See `Draft`; the longest match counts, and among equals the latest."""
        ids = list(ids)
        for size in range(min(LOOKUP_TOKENS, len(ids) - 1), 0, -1):
            tail = ids[-size:]
            # From the end: the latest occurrence resembles what follows most.
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == tail:
                    followers = ids[start + size : start + size + count]
                    return followers, [None] * len(followers)
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
    steer: Callable[[Tensor, list[int]], Tensor] = lambda row, kept: row,
) -> list[int]:
    """The next tokens of a text: the guesses that are kept, then one of the model's own.

    Takes   steer: changes the logits (V,) after the guesses that are kept.
    Shapes  logits (len(guesses) + 1, V): row i holds the model's logits after i guesses.
    """
    kept: list[int] = []
    for row, guess, q in zip(logits, guesses, chances, strict=False):
        # Only now: a grammar knows nothing of the tokens after a guess that it forbids.
        row = steer(row, kept)
        if sampling.temperature == 0:
            best = int(row.argmax())
            kept.append(best)
            if best != guess:
                return kept
            continue
        p = distribution(row[None], sampling)[0]
        keep = float(p[guess]) if q is None else float(p[guess]) / float(q[guess])
        # Algorithm 1: keep the guess with probability min(1, p / q).
        if float(torch.rand((), generator=generator, device=generator.device)) < keep:
            kept.append(guess)
            continue
        rest = remainder(p, q, guess)
        return [*kept, int(torch.multinomial(rest, 1, generator=generator))]
    return [*kept, draw(steer(logits[len(guesses)], kept), sampling, generator)[0]]


def remainder(p: Tensor, q: Tensor | None, guess: int) -> Tensor:
    """max(0, p - q), (V,): up to a factor, the distribution of the token for a rejected guess."""
    if q is None:
        # A certain guess has q = 1 at one token, where p - q is never positive.
        rest = p.index_fill(0, torch.tensor(guess, device=p.device), 0.0)
    else:
        rest = (p - q).clamp_(min=0)
    # p and q may be equal up to rounding, and then nothing remains.
    return rest if float(rest.sum()) > 0 else p


def speculate(
    engine: Engine,
    draft: Draft,
    text: Continuation,
    sampling: Sampling,
    generator: torch.Generator,
    counts: GuessCounts,
    guesses: int = GUESSES,
) -> Iterator[str]:
    """Continue one text to its end; yields the certain text after each pass of the model."""
    V = engine.config.vocab_size
    # Room for guesses beyond the budget: a pass reads them before they are judged.
    slots = engine.slots(1, len(text.ids) + text.budget + guesses + 1)
    ids = list(text.ids)
    steering = steering_of(sampling, text)

    def steer(row: Tensor, kept: list[int]) -> Tensor:
        if steering is None:
            return row
        return steering(row, text.tokens + kept)

    token, _ = draw(steer(slots.feed([0], [ids])[0, :V], []), sampling, generator)
    yield text.push(token)
    while text.finish_reason is None:
        ids.append(token)
        # One token of the budget is the model's own.
        wanted = min(guesses, text.budget - len(text.tokens) - 1)
        guessed: list[int] = []
        chances: list[Tensor | None] = []
        if wanted > 0:
            guessed, chances = draft.guess(ids, wanted)
        logits = slots.feed_all(0, [token, *guessed])[:, :V]
        judged = judge(logits, guessed, chances, sampling, generator, steer)
        counts.guessed += len(guessed)
        counts.kept += len(judged) - 1
        counts.passes += 1
        # Rejected guesses were read; the slot is cut back to the tokens that stand.
        slots.copy(0, 0, len(ids) + len(judged) - 1)
        ids += judged[:-1]
        token = judged[-1]
        yield push_all(text, judged)
    text.seconds = time.perf_counter() - text.started


def push_all(text: Continuation, tokens: Sequence[int]) -> str:
    """Give tokens to a text until it ends; the text that is certain now."""
    pieces = ""
    for token in tokens:
        pieces += text.push(token)
        if text.finish_reason is not None:
            break
    return pieces


def speculative_complete(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    *,
    draft: "LanguageModel | str",
    guesses: int = GUESSES,
    num_return_sequences: int = 1,
    **options: object,
) -> list[tuple[Completion, GuessCounts]]:
    """As `LanguageModel.complete`, one prompt at a time, with the guesses of a draft.

    Takes   draft: a smaller model, or "lookup".
    Greedy text is that of `complete`. Drawn text has the same distribution, but not the same draws.
    Raises  ConfigError if the draft has another vocabulary, `guesses` is not positive, the state
            of one of the models cannot be rewound, or a beam search is asked for.
    """
    require_draft(model, draft, guesses)
    sampling, ending, search = model.split_options(
        Drawing(**options),  # type: ignore[typeddict-item]
        num_return_sequences,
    )
    if search.num_beams > 1:
        raise ConfigError(
            f"num_beams={search.num_beams} does not go with a draft: guesses continue one text, not"
            " several beams; give one of them"
        )
    done = []
    repeated = [prompt for prompt in prompts for _ in range(num_return_sequences)]
    for place, prompt in enumerate(repeated):
        text = model.continuation(prompt, max_new_tokens, ending)
        counts = GuessCounts()
        (generator,) = sampling.after(place).generators(1, model.engine.device)
        guesser: Draft = LookupDraft()
        if isinstance(draft, LanguageModel):
            length = len(text.ids) + text.budget + guesses + 1
            length = min(length, draft.config.max_position_embeddings)
            guesser = ModelDraft(draft.engine, text, sampling, generator, length)
        for _ in speculate(model.engine, guesser, text, sampling, generator, counts, guesses):
            pass
        done.append((text.completion(), counts))
    return done


def require_draft(model: LanguageModel, draft: LanguageModel | str, guesses: int) -> None:
    """Raises  ConfigError if the draft cannot guess for the model."""
    if guesses < 1:
        raise ConfigError(f"a draft proposes at least one token at a time, got {guesses}")
    require_rewinding("the model", model.engine)
    if isinstance(draft, str):
        if draft != "lookup":
            raise ConfigError(f"unknown draft {draft!r}; give lookup or a model")
        return
    require_rewinding("the draft", draft.engine)
    ours = model.tokenizer
    theirs = draft.tokenizer
    same = ours is None or theirs is None or ours.ids == theirs.ids
    if draft.config.vocab_size != model.config.vocab_size or not same:
        raise ConfigError(
            f"the draft has another vocabulary ({draft.config.vocab_size} tokens) than the model"
            f" ({model.config.vocab_size}); choose a model of the same suite"
        )
    if draft.config.max_position_embeddings < model.config.max_position_embeddings:
        raise ConfigError(
            f"the draft reads {draft.config.max_position_embeddings} tokens and the model"
            f" {model.config.max_position_embeddings}; choose a draft that reads as many"
        )


def require_rewinding(role: str, engine: Engine) -> None:
    """Raises  ConfigError if rejected guesses could not be taken back."""
    # A slot for one token costs next to nothing and knows what the engine would do with a long one.
    if not engine.slots(1, 1).rewinds:
        raise ConfigError(
            f"speculative decoding takes back rejected guesses, and the state of {role}"
            " cannot be rewound; generate without a draft"
        )
