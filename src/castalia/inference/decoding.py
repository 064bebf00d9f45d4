"""One prompt while it is continued, and what comes of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from castalia.core.errors import ConfigError
from castalia.inference.text import TextStream

FinishReason = Literal["eod", "stop", "length", "context"]


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with."""

    prompt: str | None
    """The prompt; None when ids were given."""
    text: str
    """The continuation alone, cut before a stop string."""
    tokens: list[int]
    """The generated ids, without the end-of-document token; those of a stop string are included."""
    finish_reason: FinishReason
    """eod: the model ended the document; stop: a stop string; length: max_new_tokens; context: the model's limit."""
    seconds: float
    """From the request to this row's last token."""


@dataclass
class Row:
    """One prompt while it is continued."""

    ids: list[int]
    budget: int
    reason_at_budget: FinishReason
    stream: TextStream
    eod_id: int | None
    prompt: str | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def push(self, token: int) -> str:
        """Take the next token; return the text that is certain now."""
        if token == self.eod_id:
            return self.finish("eod")
        self.tokens.append(token)
        piece = self.stream.push(token)
        self.pieces.append(piece)
        if self.stream.stopped:
            return piece + self.finish("stop")
        if len(self.tokens) == self.budget:
            return piece + self.finish(self.reason_at_budget)
        return piece

    def finish(self, reason: FinishReason) -> str:
        """No more tokens; return the text that was held back."""
        self.finish_reason = reason
        self.pieces.append(self.stream.finish())
        return self.pieces[-1]

    def completion(self) -> Completion:
        """The finished row."""
        assert self.finish_reason is not None
        return Completion(
            self.prompt, "".join(self.pieces), self.tokens, self.finish_reason, self.seconds
        )


def make_row(
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    limit: int,
    eod_id: int | None,
    decode: Callable[[list[int]], str],
    stop: Sequence[str] = (),
    prompt: str | None = None,
) -> Row:
    """A row of `ids`, which is not empty, with room for at most max_new_tokens below the model's `limit` of tokens.

    Raises  ConfigError if the prompt leaves no room for a token.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    room = limit - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens but the model reads at most {limit}, the new ones included; shorten it"
        )
    reason: FinishReason = "length" if max_new_tokens <= room else "context"
    return Row(
        list(ids), min(max_new_tokens, room), reason, TextStream(decode, stop), eod_id, prompt
    )
