"""Dropout whose bits are a function of place: seed, step, row, layer, token and channel.

The bits are hashed from counters (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"), not drawn from a generator's state. A resume, a recomputed layer, another micro-batch size and
every layout draw the same: each rank hashes the counters of its own rows, tokens, heads and keys.

The arithmetic is that of 32-bit words in int64 tensors, in which no product overflows, so it is the
same on every device and in compiled code.

Source  the multipliers and shifts of the mixer: Wellons, hash-prospector, the best of its
        two-round functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

WORD = 0xFFFFFFFF
FIRST = 0x21F0AAAD
SECOND = 0x735A2D97
"""Multipliers below 2^31: times a 32-bit word they stay within int64."""
GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio: consecutive counters become words that are far apart."""

EMBEDDING, ATTENTION_OUT, MLP_OUT, PROBABILITIES, JITTER, CHOICE = range(6)
"""Places of a layer where something is dropped, or drawn."""


class Draws(NamedTuple):
    """What the bits of one pass, or of one layer of it, are hashed from, and the rates.

    Shapes  low, high int64 (B,), two 32-bit words of each row; tokens int64 (1, T), place in the
            row of each token held here; keys int64 (keys,), of each key that these may see.
    part    under tensor parallelism, number and count of the parts of the T tokens between the
            matrices; first head held here.
    """

    low: Tensor
    high: Tensor
    tokens: Tensor
    keys: Tensor
    part: tuple[int, int]
    head: int
    hidden: float
    attention: float

    def at(self, place: int) -> "Draws":
        """The draws of another place, a layer's number or one of the places inside."""
        word = (place + 1) * GOLDEN & WORD
        return self._replace(low=mix(self.low, word), high=mix(self.high, word))


def mix(words: Tensor, salt: Tensor | int) -> Tensor:
    """Hash 32-bit words with another one, int64 -> int64."""
    x = (words ^ (words >> 16)) * FIRST & WORD
    # The salt enters between the rounds: both then pass a multiplication.
    x = x + salt & WORD
    x = (x ^ (x >> 15)) * SECOND & WORD
    return x ^ (x >> 15)


def row_draws(seed: int, step: int, rows: Tensor) -> Tensor:
    """Two 32-bit words for each row of a batch.

    Shapes  rows (B,) int64, place of each in the served order -> (B, 2) int64.
    """
    words = []
    for lane in range(2):
        x = torch.full_like(rows, (lane + 1) * GOLDEN & WORD)
        for number in (seed & WORD, seed >> 32 & WORD, step & WORD):
            x = mix(x, number)
        x = mix(mix(x, rows & WORD), rows >> 32 & WORD)
        words.append(x)
    return torch.stack(words, 1)


def kept(low: Tensor, high: Tensor, counters: Tensor, rate: float) -> Tensor:
    """Bool, True with probability 1 - rate, of words (...) and counters (n,): (..., n)."""
    x = low[..., None] + counters * GOLDEN & WORD
    # 24 bits decide, which is the resolution of the rate.
    return mix(x, high[..., None]) >> 8 >= round(rate * 2**24)


def scaled(x: Tensor, keep: Tensor, rate: float) -> Tensor:
    """What is kept, over 1 - rate; the rest is 0."""
    # A fill and not a product with 0 and 1: the backward then keeps one byte a number.
    return x.masked_fill(~keep, 0.0) * (1.0 / (1.0 - rate))


def drop_hidden(x_BTC: Tensor, draws: Draws | None, place: int) -> Tensor:
    """Dropout of a part of the residual stream; the same tensor without draws.

    Shapes  (B, T, C), T the tokens held here or, under tensor parallelism, a part of them.
    """
    if draws is None or draws.hidden == 0.0:
        return x_BTC
    low, high = token_words(draws.at(place), x_BTC.shape[1])
    channels = torch.arange(x_BTC.shape[2], device=x_BTC.device)
    return scaled(x_BTC, kept(low, high, channels, draws.hidden), draws.hidden)


def token_words(draws: Draws, T: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit words of each token, int64 (B, T); T may be a part of those between the
    matrices."""
    number = draws.part[0]
    tokens = draws.tokens
    if tokens.shape[1] > T:
        tokens = tokens[:, number * T : (number + 1) * T]
    return mix(draws.low[:, None], tokens), mix(draws.high[:, None], tokens)


def uniform(draws: Draws, place: int, T: int, channels: int) -> Tensor:
    """Numbers of each token from 0 to 1, both excluded; (B, T, channels) float32."""
    low, high = token_words(draws.at(place), T)
    counters = torch.arange(channels, device=low.device)
    x = low[..., None] + counters * GOLDEN & WORD
    # 23 bits and a half of one: the last number below 1 that fp32 has.
    return ((mix(x, high[..., None]) >> 9) + 0.5) * 2.0**-23


def drop_probabilities(p_BHTK: Tensor, draws: Draws) -> Tensor:
    """Dropout of attention probabilities (B, H, T, keys), H the heads held here."""
    own = draws.at(PROBABILITIES)
    heads = draws.head + torch.arange(p_BHTK.shape[1], device=p_BHTK.device)
    low = mix(mix(own.low[:, None], heads)[..., None], own.tokens[:, None])
    high = mix(mix(own.high[:, None], heads)[..., None], own.tokens[:, None])
    return scaled(p_BHTK, kept(low, high, own.keys, draws.attention), draws.attention)


def project(layer: nn.Linear, x: Tensor, draws: Draws | None) -> Tensor:
    """layer(x); a layer that drops a part of what it reads gets what it draws from."""
    # As an argument and not left on the module: a layer that is recomputed draws again, when
    # another micro-batch may have passed.
    if draws is None or not getattr(layer, "draws_input", False):
        out: Tensor = layer(x)
        return out
    return layer(x, draws=draws)  # type: ignore[no-any-return]
