"""Tokens with their log-probabilities, out of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probability in nats, and the likeliest tokens at its position.

    The log-probability of a text's first token is None: nothing precedes it.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def score(logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int) -> list[ScoredToken]:
    """Log-probabilities of tokens (T,) from logits (T, V), with the `top` likeliest beside each.

    The softmax runs over all of V, as in training. Only the first `vocab_size` are real tokens; the
    rest is padding and never reported.
    """
    logprobs = logits.float().log_softmax(-1)
    real = logprobs[:, :vocab_size]
    if top == 1:
        # What a harness asks for; the search for several takes twice as long.
        values, ids = real.max(-1, keepdim=True)
    else:
        values, ids = real.topk(min(top, vocab_size))
    picked = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    rows = zip(tokens, picked, values.tolist(), ids.tolist(), strict=True)
    return [
        ScoredToken(token, value, list(zip(best_ids, best, strict=True)))
        for token, value, best, best_ids in rows
    ]


class SharedScores:
    """Scores of logits that several prompts of one beginning are given one after the other."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.known: dict[tuple[tuple[int, ...], int], list[ScoredToken]] = {}
        """Of `logits`, by the tokens and the number of likeliest tokens."""

    def score(
        self, logits: Tensor, tokens: Sequence[int], top: int, vocab_size: int
    ) -> list[ScoredToken]:
        """See `score`."""
        if logits is not self.logits:
            self.logits = logits
            self.known = {}
        key = (tuple(tokens), top)
        if key not in self.known:
            self.known[key] = score(logits[: len(tokens)], tokens, top, vocab_size)
        return self.known[key]
