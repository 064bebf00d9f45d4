"""Beam search: the best texts of a prompt among those that grow from its likeliest beginnings.

At each step every beam is continued by all tokens. The best continuations become the next beams;
those that end become results, whose score is their log-probability divided by a power of their
length.

Source  transformers 5, `GenerationMixin._beam_search`: the same texts and scores, for beams that
        are drawn (temperature above 0) as well.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.decoding import Completion, Continuation
from castalia.inference.sampling import Sampling, warped
from castalia.inference.steering import BANNED, NoTokenError, steering_of


@dataclass(frozen=True)
class Search:
    """How many texts a prompt gets, and how they are searched for."""

    num_return_sequences: int = 1
    """Texts for each prompt: drawn ones, or the best of a beam search."""
    num_beams: int = 1
    """Texts that a beam search grows at a time; 1 is no beam search."""
    length_penalty: float = 1.0
    """A score is a log-probability divided by the length to this power: above 0 favors long texts,
    below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search with num_beams results ends. True: at once. False: when the best beam, as
    long as it is, scores no better than the worst result. "never": when it cannot at any length."""

    def __post_init__(self) -> None:
        """Raises  ConfigError with every value that is out of range."""
        problems = []
        for name in ("num_return_sequences", "num_beams"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be >= 1, got {getattr(self, name)}")
        if not math.isfinite(self.length_penalty):
            problems.append(f"length_penalty must be a number, got {self.length_penalty}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            problems.append(
                f"early_stopping must be true, false or 'never', got {self.early_stopping!r}"
            )
        if problems:
            raise ConfigError("; ".join(problems))
        if self.num_beams > 1:
            if self.num_return_sequences > self.num_beams:
                raise ConfigError(
                    f"num_return_sequences={self.num_return_sequences} is above"
                    f" num_beams={self.num_beams}; a search finds as many texts as it has beams"
                )
            return
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(self, name) != neutral:
                raise ConfigError(
                    f"{name}={getattr(self, name)} needs a beam search; set num_beams above 1"
                )

    def require_several(self, sampling: Sampling) -> None:
        """Raises  ConfigError if several texts are asked for that would all be the same."""
        if self.num_return_sequences > 1 and self.num_beams == 1 and sampling.temperature == 0:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} greedy texts would be the same;"
                " set a temperature above 0, or num_beams"
            )


@dataclass(eq=False)
class Beam:
    """A text while it grows, or a result."""

    text: Continuation
    score: float
    """Log-probability of its tokens in nats; of a result, divided by the length penalty."""
    slot: int = -1
    """Slot of the engine that holds its tokens but the last."""
    token: int = -1
    """The last token, which the engine has not read yet."""
    watched: list[Any] = field(default_factory=list)
    """What `watch` said of its tokens."""


class BeamSearch:
    """The search of one prompt.

    It computes nothing itself: a batcher reads the prompt and the tokens of the beams, and gives
    the logits to `advance`.
    """

    def __init__(
        self,
        text: Continuation,
        sampling: Sampling,
        search: Search,
        generator: torch.Generator,
        watch: Callable[[Tensor, int], Any] | None = None,
    ) -> None:
        self.text = text
        self.sampling = sampling
        self.search = search
        self.generator = generator
        self.watch = watch
        """Called with the logits (V,) of the model, padding included, and the token after them."""
        # All beams share it: it depends on the tokens that it is asked about alone.
        self.steering = steering_of(sampling, text)
        self.slots: list[int] = []
        """The engine's slots that belong to the search, num_beams of them."""
        self.beams = [Beam(text, 0.0)]
        """The growing texts, best first."""
        self.results: list[Beam] = []
        """The best num_beams texts that ended, best first."""
        self.steps = 0
        self.error: Exception | None = None
        """What ended the search, if it failed."""
        # With a continuation for every token that may end a text, enough are left to go on with.
        self.spare = max(2, 1 + len(text.ends))

    def begin(self, slots: list[int]) -> None:
        """Take slots, the first of which holds the prompt."""
        self.slots = slots
        self.beams[0].slot = slots[0]

    def advance(self, logits: Tensor, vocab_size: int) -> list[tuple[int, int]]:
        """Continue each beam by one token.

        Shapes  logits (beams, V), V at least `vocab_size`, whose rest is padding.
        Returns  (origin, target) of the slots to copy, before the new beams are read.
        """
        scores = self.scores(logits, vocab_size)
        growing: list[Beam] = []
        # One more token, that which ends a text included.
        self.steps += 1
        for rank, (score, row, token) in enumerate(self.candidates(scores)):
            # A token that is ruled out still has its rank: the result does not depend on others.
            if score == -math.inf:
                continue
            beam = self.continued(self.beams[row], score, token, logits[row])
            if beam.text.finish_reason is None:
                growing.append(beam)
            elif rank < self.search.num_beams:
                # Those behind are there to go on with, and not good enough to be results.
                beam.score = score / self.steps**self.search.length_penalty
                self.results.append(beam)
        self.results = best(self.results, self.search.num_beams)
        self.beams = best(growing, self.search.num_beams)
        return self.place()

    def scores(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Log-probability of each beam with each token after it: (beams, vocab_size) float32."""
        # Over the padding as well, as in training and in transformers; it is never chosen.
        logprobs = logits.float().log_softmax(-1)[:, :vocab_size]
        if self.steering is not None:
            rows = zip(logprobs, self.beams, strict=True)
            logprobs = torch.stack([self.steered(row, beam) for row, beam in rows])
        if self.sampling.temperature:
            logprobs = warped(logprobs, self.sampling, self.spare)
        before = torch.tensor([beam.score for beam in self.beams], device=logprobs.device)
        return logprobs + before[:, None]

    def steered(self, logprobs: Tensor, beam: Beam) -> Tensor:
        """Log-probabilities (V,) of the tokens after a beam, with the changes of the options."""
        assert self.steering is not None
        try:
            return self.steering(logprobs, beam.text.tokens)
        except NoTokenError:
            # Only this beam has no way on.
            return torch.full_like(logprobs, BANNED)

    def candidates(self, scores: Tensor) -> list[tuple[float, int, int]]:
        """The continuations that count, with their beam and token: the best ones, or drawn ones."""
        flat = scores.flatten()
        count = self.spare * self.search.num_beams
        if self.sampling.temperature:
            chances = scores.new_zeros(self.search.num_beams * scores.shape[1])
            chances[: len(flat)] = flat.softmax(-1)
            # Over all beams even where some are missing, as at the first step: the draws are then
            # those of transformers. No more than have a chance: nothing else may be drawn.
            count = min(count, int((chances > 0).sum()))
            places = torch.multinomial(chances, count, generator=self.generator)
            values = flat[places]
        else:
            values, places = flat.topk(min(count, len(flat)))
        width = scores.shape[1]
        return [
            (value, place // width, place % width)
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def continued(self, beam: Beam, score: float, token: int, logits: Tensor) -> Beam:
        """A beam with one more token, drawn after logits (V,)."""
        text = beam.text.fork()
        text.push(token)
        watched = beam.watched
        if self.watch is not None:
            watched = [*watched, self.watch(logits, token)]
        return Beam(text, score, beam.slot, token, watched)

    def place(self) -> list[tuple[int, int]]:
        """Give each beam a slot of its own; the (origin, target) of the copies that this takes."""
        # The first beam of an origin stays there. The slots of beams that were given up are as many
        # as the others need, and nothing is copied from them.
        origins = {beam.slot for beam in self.beams}
        free = [slot for slot in self.slots if slot not in origins]
        copies = []
        for beam in self.beams:
            if beam.slot in origins:
                origins.remove(beam.slot)
                continue
            target = free.pop()
            copies.append((beam.slot, target))
            beam.slot = target
        return copies

    @property
    def done(self) -> bool:
        """Whether no beam can become a better result."""
        if self.error is not None or not self.beams:
            return True
        if len(self.results) < self.search.num_beams:
            return False
        if self.search.early_stopping is True:
            return True
        length = self.steps
        if self.search.early_stopping == "never" and self.search.length_penalty > 0:
            # A log-probability counts for least at the greatest length.
            length = self.text.budget
        hope = self.beams[0].score / length**self.search.length_penalty
        return hope <= self.results[-1].score

    def answers(self) -> list[Beam]:
        """The num_return_sequences best results of a search that is done, best first.

        Raises  the error of the search; ConfigError if there are fewer.
        """
        if self.error is not None:
            raise self.error
        count = self.search.num_return_sequences
        if len(self.results) < count:
            raise ConfigError(
                f"a beam search found {len(self.results)} texts of {count}: the options allow no"
                " more; ask for fewer, or allow more tokens"
            )
        seconds = time.perf_counter() - self.text.started
        for beam in self.results[:count]:
            beam.text.seconds = seconds
        return self.results[:count]

    def completions(self) -> list[Completion]:
        """The answers with their scores.

        Raises  as `answers`.
        """
        return [replace(beam.text.completion(), score=beam.score) for beam in self.answers()]


def best(beams: list[Beam], count: int) -> list[Beam]:
    """The `count` beams of the highest scores, best first; the earlier one of equals."""
    return sorted(beams, key=lambda beam: -beam.score)[:count]
