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

    The order is fixed: allowed ids and grammar, logit_bias, repetition_penalty, frequency_penalty
    and presence_penalty (see steering.py); then logits / temperature, top-k, top-p, min-p, a draw.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token and needs no filter."""
    top_k: int = 0
    """Keep the k largest logits and those equal to the k-th; 0 and -1 keep all."""
    top_p: float = 0.0
    """Keep the most likely tokens until their probabilities exceed p, the one that crosses p
    included; 0 and 1 keep all."""
    min_p: float = 0.0
    """Keep the tokens that are at least min_p times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of the tokens in prompt and text."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the tokens in the text, without the prompt."""
    frequency_penalty: float = 0.0
    """Subtracted from the same logits once for each time that the token occurs."""
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
        if not 0 <= self.top_p <= 1:
            problems.append(f"top_p must be from 0 to 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p must be from 0 to 1, got {self.min_p}")
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


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with -inf below the k-th largest of each row; those equal to it stay."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with -inf outside the nucleus: the fewest tokens whose probability exceeds p.

    Source  Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the token that crosses p is kept.
    """
    if p <= 0 or p >= 1:
        return logits
    # Stable, so that equal logits stay in the order of their ids on every device.
    ordered, order = logits.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    # The mass before a token decides: the token that crosses p is still inside.
    before = probs.cumsum(-1) - probs
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(dropped, float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with -inf where a token is less than p times as likely as the likeliest.

    Source  Nguyen et al. 2024, arXiv:2407.01082, algorithm 1.
    """
    if p <= 0:
        return logits
    # Of logits, not of probabilities: their ratio needs no softmax.
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the draw at a temperature above 0: logits (B, V) -> (B, V) float32."""
    scaled = logits.float() / sampling.temperature
    # Top-k first: the nucleus is then that of the distribution which top-k leaves. Min-p compares
    # with the likeliest token, which both keep, so only its place before or after top-p matters.
    kept = keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p)
    return keep_min_p(kept, sampling.min_p).softmax(-1)


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
