"""What changes the logits of one text before a token is drawn: bans, a grammar, bias, penalties."""

from collections.abc import Sequence

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.decoding import Continuation
from castalia.inference.sampling import Sampling

BANNED = float("-inf")


class NoTokenError(ConfigError):
    """Every token is ruled out."""


class Steering:
    """Changes the logits of one text.

    The same tokens give the same logits, whatever was asked before: a guess of speculative decoding
    is judged by the logits that the token in its place would have been drawn from.

    Source  repetition_penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1, over prompt and
            text, with negative logits multiplied, as in transformers and vLLM. presence_penalty and
            frequency_penalty: OpenAI's API reference, mu[j] - c[j] * frequency - (c[j] > 0) *
            presence, with counts c of the text without its prompt.
    """

    def __init__(self, sampling: Sampling, text: Continuation) -> None:
        self.sampling = sampling
        self.ids = text.ids
        self.prompt = set(text.ids)
        self.ends = sorted(text.ends)
        self.min_tokens = text.min_tokens
        self.matcher = None if sampling.grammar is None else sampling.grammar.matcher()
        self.allowed = None
        if sampling.allowed_token_ids is not None:
            self.allowed = torch.tensor(list(sampling.allowed_token_ids))
        self.biased = torch.tensor(list(sampling.logit_bias), dtype=torch.int64)
        self.bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)

    def __call__(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Logits (V,) after `tokens` of the text -> new logits (V,) float32."""
        # A copy: log-probabilities are reported of the model's own logits.
        logits = logits.float().clone()
        self.ban(logits, tokens)
        logits.index_add_(0, self.biased.to(logits.device), self.bias.to(logits.device))
        # After the bias, as in transformers and vLLM.
        self.penalize(logits, tokens)
        if self.sampling.no_repeat_ngram_size:
            self.ban_repeats(logits, tokens)
        return logits

    def ban(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Rule out the tokens that may not come next, in place."""
        if self.allowed is not None:
            allowed = self.allowed.to(logits.device)
            kept = logits[allowed]
            logits.fill_(BANNED)
            logits[allowed] = kept
        if self.matcher is not None:
            logits.masked_fill_(~self.matcher.allowed(tokens).to(logits.device), BANNED)
        if len(tokens) < self.min_tokens:
            logits[self.ends] = BANNED

    def ban_repeats(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Rule out the tokens that would end an n-gram of prompt and text once more, in place.

        Raises  NoTokenError if no token is left.
        """
        size = self.sampling.no_repeat_ngram_size
        repeats = followers([*self.ids, *tokens], size - 1)
        logits[sorted(repeats)] = BANNED
        # An argmax of nothing but -inf would be token 0.
        if repeats and bool((logits == BANNED).all()):
            raise NoTokenError(
                f"no_repeat_ngram_size={size} leaves no token to continue with after"
                f" {len(tokens)} new ones; choose a larger size or fewer tokens"
            )

    def penalize(self, logits: Tensor, tokens: Sequence[int]) -> None:
        """Apply the penalties, in place."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            ids = torch.tensor(sorted(self.prompt.union(tokens)), device=logits.device)
            picked = logits[ids]
            penalty = sampling.repetition_penalty
            logits[ids] = torch.where(picked > 0, picked / penalty, picked * penalty)
        if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(tokens, device=logits.device).unique(return_counts=True)
            logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def followers(ids: Sequence[int], count: int) -> set[int]:
    """The tokens that came, anywhere in `ids`, after the last `count` of them."""
    last = list(ids[len(ids) - count :])
    if len(last) < count:
        return set()
    # The last place is the text's own end, which nothing follows yet.
    places = range(len(ids) - count)
    return {ids[at + count] for at in places if ids[at : at + count] == last}


def steering_of(sampling: Sampling, text: Continuation) -> Steering | None:
    """The steering of a text; None if the model's logits stay as they are."""
    if sampling.steers or text.min_tokens:
        return Steering(sampling, text)
    return None
