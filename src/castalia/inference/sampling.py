"""From logits to the next token: greedy, temperature and filters, one generator a row."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.grammar import Grammar

SMALLEST_TEMPERATURE = 1e-5
"""Smaller ones are greedy, as in vLLM."""
SMALLEST_SEED = -(2**63)
LARGEST_SEED = 2**63 - 1
"""Seeds are int64, as in OpenAI's API and vLLM."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that the next token is drawn from.

    The order is fixed, and that of transformers: logit_bias, repetition_penalty, frequency_penalty
    and presence_penalty, bans (see steering.py); then logits / temperature, top-k, top-p, min-p,
    typical-p, a draw.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token and needs no filter."""
    top_k: int = 0
    """Keep the k largest logits and those equal to the k-th; 0 and -1 keep all."""
    top_p: float = 0.0
    """Keep the fewest of the most likely tokens whose probabilities reach p; 0 and 1 keep all."""
    min_p: float = 0.0
    """Keep the tokens that are at least min_p times as likely as the likeliest; 0 keeps all."""
    typical_p: float = 0.0
    """Keep the tokens whose information is nearest to the entropy until their probabilities reach
    p; 0 and 1 keep all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of the tokens in prompt and text."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the tokens in the text, without the prompt."""
    frequency_penalty: float = 0.0
    """Subtracted from the same logits once for each time that the token occurs."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice in prompt and text; 0 allows it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    allowed_token_ids: Sequence[int] | None = None
    """The only ids that may be drawn; None allows all."""
    grammar: Grammar | None = None
    """The form that the text must have."""
    seed: int | None = None
    """Seed of the draws; row b of a batch uses seed + b. None draws a new one for each call."""

    def __post_init__(self) -> None:
        """Raises  ConfigError with every number that is out of range."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k < -1:
            problems.append(f"top_k must be >= 0, got {self.top_k}")
        for name in ("top_p", "min_p", "typical_p"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.no_repeat_ngram_size < 0:
            problems.append(f"no_repeat_ngram_size must be >= 0, got {self.no_repeat_ngram_size}")
        if not 0.01 <= self.repetition_penalty <= 100:
            problems.append(
                f"repetition_penalty must be from 0.01 to 100, got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                problems.append(f"{name} must be from -2 to 2, got {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                problems.append(f"logit_bias must be from -100 to 100, got {bias} for {token}")
        if self.seed is not None and not SMALLEST_SEED <= self.seed <= LARGEST_SEED:
            problems.append(f"seed must be an int64, got {self.seed}")
        if problems:
            raise ConfigError("; ".join(problems))
        # Logits divided by less could overflow; no draw would differ from greedy text.
        if self.temperature < SMALLEST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def steers(self) -> bool:
        """Whether the logits of a text depend on more than the model."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.no_repeat_ngram_size != 0
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or self.grammar is not None
        )

    def after(self, rows: int) -> "Sampling":
        """The sampling after `rows` rows of a call: a row's seed is its place in the whole call."""
        if self.seed is None:
            return self
        return replace(self, seed=wrapped(self.seed + rows))

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator]:
        """One generator a row: a prompt's text then does not depend on the rest of its batch."""
        # Not torch's global generator: loading a model or drawing elsewhere must not change texts.
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return [torch.Generator(device).manual_seed(wrapped(seed + row)) for row in range(rows)]


def wrapped(seed: int) -> int:
    """A seed beyond int64 as an int64: the last one is followed by the first."""
    return (seed - SMALLEST_SEED) % 2**64 + SMALLEST_SEED


def keep_top_k(logits: Tensor, k: int, fewest: int = 1) -> Tensor:
    """Logits (B, V) with -inf below the k-th largest of each row; those equal to it stay."""
    k = max(k, fewest) if k > 0 else 0
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float, fewest: int = 1) -> Tensor:
    """Logits (B, V) with -inf outside the nucleus: the fewest tokens whose probabilities reach p.

    Source  Holtzman et al. 2020, arXiv:1904.09751, equation 2.
    """
    if p <= 0 or p >= 1:
        return logits
    # Stable, so that equal logits stay in the order of their ids on every device.
    ordered, order = logits.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    # The mass before a token decides: the token that reaches p is still inside.
    outside = probs.cumsum(-1) - probs >= p
    outside[..., :fewest] = False
    dropped = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(dropped, float("-inf"))


def keep_min_p(logits: Tensor, p: float, fewest: int = 1) -> Tensor:
    """Logits (B, V) with -inf where a token is less than p times as likely as the likeliest.

    Source  Nguyen et al. 2024, arXiv:2407.01082, algorithm 1.
    """
    if p <= 0:
        return logits
    # Of logits, not of probabilities: their ratio needs no softmax.
    dropped = logits < logits.amax(-1, keepdim=True) + math.log(p)
    if fewest > 1:
        likeliest = logits.topk(min(fewest, logits.shape[-1])).indices
        dropped.scatter_(-1, likeliest, False)
    return logits.masked_fill(dropped, float("-inf"))


def keep_typical_p(logits: Tensor, p: float, fewest: int = 1) -> Tensor:
    """Logits (B, V) with -inf outside the typical set: the tokens whose information -log p(x) is
    nearest to the entropy, as few as reach the mass p, and those as near as the last of them.

    Source  Meister et al. 2022, arXiv:2202.00666, equation 11.
    """
    if p <= 0 or p >= 1:
        return logits
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    # nansum: a token that is ruled out has 0 * -inf, whose limit is 0.
    entropy = -(logprobs * probs).nansum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    nearest, order = distance.sort(stable=True)
    short = probs.gather(-1, order).cumsum(-1) < p
    last = short.sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
    outside = nearest > nearest.gather(-1, last)
    outside[..., :fewest] = False
    dropped = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(dropped, float("-inf"))


def warped(logits: Tensor, sampling: Sampling, fewest: int = 1) -> Tensor:
    """Logits (B, V) / temperature, with -inf where a filter rules a token out: (B, V) float32.

    Takes   fewest: tokens of a row that every filter keeps, whatever it says.
    """
    kept = logits.float() / sampling.temperature
    # Top-k first: the nucleus is then that of the distribution which top-k leaves.
    kept = keep_top_k(kept, sampling.top_k, fewest)
    kept = keep_top_p(kept, sampling.top_p, fewest)
    kept = keep_min_p(kept, sampling.min_p, fewest)
    return keep_typical_p(kept, sampling.typical_p, fewest)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the draw at a temperature above 0: logits (B, V) -> (B, V) float32."""
    return warped(logits, sampling).softmax(-1)


def next_tokens(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row.

    Shapes  logits (B, V) -> (B,) int64. V is the real vocabulary, without its padding, which
            must never be drawn.
    """
    if sampling.temperature == 0:
        if logits.device.type == "cpu":
            # numpy's argmax is eight times as fast as torch's; both take the first of equals.
            return torch.from_numpy(logits.numpy().argmax(-1))
        return logits.argmax(-1)
    probs = distribution(logits, sampling)
    # Row by row, because every row has a generator of its own.
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probs, generators, strict=True)
    ]
    return torch.cat(drawn)
