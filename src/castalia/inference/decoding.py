"""The decoding loop: a batch of prompts of any lengths through the KV cache, one token a row at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.inference.sampling import Sampling, next_tokens
from castalia.inference.text import TextStream
from castalia.models import Decoder, KVCache

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
    """From the start of the batch to this row's last token."""


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
        return Completion(self.prompt, "".join(self.pieces), self.tokens, self.finish_reason, self.seconds)


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
    return Row(list(ids), min(max_new_tokens, room), reason, TextStream(decode, stop), eod_id, prompt)


class Session:
    """A model with the KV cache of a batch."""

    def __init__(self, model: Decoder, rows: Sequence[Row]) -> None:
        self.model = model
        self.weight = model.head_weight
        self.lengths = [len(row.ids) for row in rows]
        slots = max(self.lengths) + max(row.budget for row in rows)
        self.cache = KVCache(model.config, len(rows), slots, self.weight.dtype, self.weight.device)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, V) after the last token of each prompt; V is the real vocabulary."""
        lengths = torch.tensor(self.lengths, device=self.weight.device)
        tokens = torch.zeros(len(prompts), max(self.lengths), dtype=torch.int64)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = torch.tensor(ids)
        hidden = self.model(tokens.to(self.weight.device), cache=self.cache)
        self.cache.rewind(lengths)
        return self.logits(hidden[torch.arange(len(prompts), device=hidden.device), lengths - 1])

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token of each row; tokens (B,) int64."""
        return self.logits(self.model(tokens[:, None], cache=self.cache)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) float32 of hidden states (B, C), the columns of the vocabulary's padding left out."""
        logits: Tensor = self.model.head(hidden)[..., : self.model.config.vocab_size]
        return logits.float()


def decode_rows(model: Decoder, rows: Sequence[Row], sampling: Sampling) -> Iterator[list[str]]:
    """Continue all rows until each has a finish reason; yield the new text of each row after every token.

    Rows that are finished stay in the batch and yield empty text.
    """
    start = time.perf_counter()
    session = Session(model, rows)
    generators = sampling.generators(len(rows), session.weight.device)
    logits = session.read([row.ids for row in rows])
    while True:
        tokens = next_tokens(logits, sampling, generators)
        pieces = [
            row.push(token) if row.finish_reason is None else ""
            for row, token in zip(rows, tokens.tolist(), strict=True)
        ]
        for row in rows:
            if row.finish_reason is not None and not row.seconds:
                row.seconds = time.perf_counter() - start
        yield pieces
        if all(row.finish_reason is not None for row in rows):
            return
        logits = session.feed(tokens)
