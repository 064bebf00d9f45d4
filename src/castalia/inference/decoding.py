"""One prompt while it is continued, and the result."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from castalia.core.errors import ConfigError
from castalia.inference.text import TextStream

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
    """eod: a token that ends a text; stop: a stop string; length: max_new_tokens; context: the
    model's limit."""
    seconds: float
    """From the request to the last token."""


@dataclass
class Continuation:
    """One prompt while it is continued."""

    ids: list[int]
    """The prompt."""
    budget: int
    """Tokens that may be generated."""
    reason_at_budget: FinishReason
    stream: TextStream
    end_ids: tuple[int, ...]
    """Tokens that end the text."""
    prompt: str | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def push(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        # A token that ends the text is not part of it: it is neither kept nor decoded.
        if token in self.end_ids:
            return self.finish("eod")
        self.tokens.append(token)
        piece = self.stream.push(token)
        self.pieces.append(piece)
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
    end_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    stop: Sequence[str] = (),
    prompt: str | None = None,
) -> Continuation:
    """A continuation of `ids` by at most max_new_tokens, within the model's `limit` of tokens.

    `ids` has at least one token.
    Raises  ConfigError if the prompt leaves no room for a token.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    room = limit - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens but the model reads at most {limit}, new ones"
            " included; shorten it"
        )
    return Continuation(
        list(ids),
        budget=min(max_new_tokens, room),
        reason_at_budget="length" if max_new_tokens <= room else "context",
        stream=TextStream(decode, stop, behind(ids, end_ids)),
        end_ids=tuple(end_ids),
        prompt=prompt,
    )


def behind(ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, which the text continues; empty where a new text begins."""
    tail: list[int] = []
    for token in reversed(ids[-CONTEXT_TOKENS:]):
        if token in end_ids:
            break
        tail.append(token)
    return tail[::-1]
