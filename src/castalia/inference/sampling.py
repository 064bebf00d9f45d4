"""From logits to the next token: greedy, temperature, top-k and top-p, one generator a row."""

import secrets
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from castalia.core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The distribution that the next token is drawn from.

    The order is fixed: logits / temperature, then top-k, then top-p, then a draw.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token and ignores the other options."""
    top_k: int = 0
    """Keep the k largest logits and those equal to the k-th; 0 keeps all."""
    top_p: float = 0.0
    """Keep the most likely tokens until their probabilities exceed p, the one that crosses p
    included; 0 and 1 keep all."""
    seed: int | None = None
    """Seed of the draws; row b of a batch uses seed + b. None draws a new one for each call."""

    def __post_init__(self) -> None:
        """Raises  ConfigError with every number that is out of range."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k must be >= 0, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            problems.append(f"top_p must be from 0 to 1, got {self.top_p}")
        if problems:
            raise ConfigError("; ".join(problems))

    def after(self, rows: int) -> "Sampling":
        """The sampling after `rows` rows of a call: a row's seed is its place in the whole call."""
        if self.seed is None:
            return self
        return replace(self, seed=self.seed + rows)

    def generators(self, rows: int, device: torch.device) -> list[torch.Generator]:
        """One generator a row: a prompt's text then does not depend on the rest of its batch."""
        # Not torch's global generator: loading a model or drawing elsewhere must not change texts.
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return [torch.Generator(device).manual_seed(seed + row) for row in range(rows)]


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


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the draw at a temperature above 0: logits (B, V) -> (B, V) float32."""
    scaled = logits.float() / sampling.temperature
    # Top-k first: the nucleus is then that of the distribution which top-k leaves.
    return keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p).softmax(-1)


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
