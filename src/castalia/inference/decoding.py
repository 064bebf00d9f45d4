"""One prompt while it is continued, and the result."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from castalia.core.errors import ConfigError
from castalia.inference.text import TextStream
from castalia.tokenizers.special_ids import SpecialIds

FinishReason = Literal["eod", "stop", "length", "context"]
CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded with the text: a decoder may write a token differently at
the beginning of a text. Four bytes make the longest character; the rest is to spare."""


@dataclass(frozen=True)
class Completion:
    """A finished continuation of one prompt."""

    prompt: str | None
    """The prompt; None if ids were given."""
    text: str
    """The continuation alone, cut before a stop string."""
    tokens: list[int]
    """The generated ids, without the token that ended the text; those of a stop string are
    included."""
    finish_reason: FinishReason
    """eod: a token that ends a text; stop: a stop string or token of the request; length:
    max_new_tokens; context: the model's limit."""
    seconds: float
    """From the request to the last token."""
    score: float | None = None
    """Of a beam search: log-probability of the tokens, in nats, divided by the length penalty."""


@dataclass(frozen=True)
class Ending:
    """What ends a text besides its length."""

    stop: Sequence[str] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the text; they are not part of it."""
    ignore_eos: bool = False
    """The end-of-document token is a token like any other."""
    min_tokens: int = 0
    """No token and no stop string ends the text before it has this many tokens."""
    keep_stop: bool = False
    """The stop string or token that ends the text is part of it."""
    skip_special: bool = False
    """The names of special tokens are left out of the text."""


@dataclass
class Continuation:
    """One prompt while it is continued."""

    ids: list[int]
    """The prompt."""
    budget: int
    """Tokens that may be generated."""
    reason_at_budget: FinishReason
    stream: TextStream
    ends: Mapping[int, FinishReason]
    """Tokens that end the text, and the reason that each gives."""
    min_tokens: int = 0
    keep_stop: bool = False
    prompt: str | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def push(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        reason = self.ends.get(token)
        # A token that ends the text is not part of it: it is neither kept nor decoded.
        if reason is not None and not (reason == "stop" and self.keep_stop):
            return self.finish(reason)
        self.tokens.append(token)
        piece = self.stream.push(token)
        self.pieces.append(piece)
        if reason is not None:
            return piece + self.finish(reason)
        # A stop string wins over the budget, as it ends the text earlier.
        if self.stream.stopped:
            return piece + self.finish("stop")
        if len(self.tokens) == self.budget:
            return piece + self.finish(self.reason_at_budget)
        return piece

    def finish(self, reason: FinishReason) -> str:
        """End the text; return what the stream held back."""
        self.finish_reason = reason
        self.pieces.append(self.stream.finish())
        return self.pieces[-1]

    def fork(self) -> "Continuation":
        """A copy that goes on by itself."""
        return replace(
            self, stream=self.stream.fork(), tokens=list(self.tokens), pieces=list(self.pieces)
        )

    def completion(self) -> Completion:
        """The result, once there is a finish reason."""
        assert self.finish_reason is not None
        return Completion(
            self.prompt, "".join(self.pieces), self.tokens, self.finish_reason, self.seconds
        )


def begin(
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    limit: int,
    special: SpecialIds,
    decode: Callable[[list[int]], str],
    ending: Ending = Ending(),
    scoring: bool = False,
    prompt: str | None = None,
) -> Continuation:
    """A continuation of `ids` by at most max_new_tokens, within the model's `limit` of tokens.

    `ids` has at least one token. `scoring` reads it and adds none.
    Raises  ConfigError if the prompt leaves no room for a token, or max_new_tokens is below
            min_tokens.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not 0 <= ending.min_tokens <= max_new_tokens:
        raise ConfigError(
            f"min_tokens must be from 0 to max_new_tokens={max_new_tokens}, got {ending.min_tokens}"
        )
    room = limit - len(ids)
    if room < (0 if scoring else 1):
        raise ConfigError(
            f"the prompt has {len(ids)} tokens but the model reads at most {limit}, new ones"
            " included; shorten it"
        )
    ends: dict[int, FinishReason] = {}
    if not ending.ignore_eos:
        ends.update(dict.fromkeys(special.end_ids, "eod"))
    for token in ending.stop_token_ids:
        ends.setdefault(token, "stop")
    stream = TextStream(
        decode,
        ending.stop,
        behind(ids, special),
        keep_stop=ending.keep_stop,
        min_tokens=ending.min_tokens,
    )
    return Continuation(
        list(ids),
        budget=min(max_new_tokens, room),
        reason_at_budget="length" if max_new_tokens <= room else "context",
        stream=stream,
        ends=ends,
        min_tokens=ending.min_tokens,
        keep_stop=ending.keep_stop,
        prompt=prompt,
    )


def behind(ids: Sequence[int], special: SpecialIds) -> list[int]:
    """The last tokens of a prompt, which the text continues; empty where a new text begins."""
    tail: list[int] = []
    for token in reversed(ids[-CONTEXT_TOKENS:]):
        if token == special.start_id or token in special.end_ids:
            break
        tail.append(token)
    return tail[::-1]
