"""A request that is being answered: its texts and the inbox of their events."""

import asyncio
import time
from dataclasses import dataclass, field

from castalia.core.errors import ConfigError
from castalia.serve.answer_json import json_bytes
from castalia.serve.answers import AnswerFormat, CollectedText
from castalia.serve.loaded_models import LoadedModel
from castalia.serve.protocol import Usage
from castalia.serve.scheduler import Job, ServedText, StreamEvent
from castalia.serve.token_report import TokenReport

Inbox = asyncio.Queue[tuple[int, StreamEvent]]
"""Events of one request, each with the index of its text."""


class FailedError(Exception):
    """An exception on the scheduler's thread, as its client is told of it."""

    def __init__(self, cause: Exception) -> None:
        self.status = 500
        message = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, ConfigError):  # a form that turned out too large is the request's
            self.status = 400
            message = str(cause)
        super().__init__(message)


class ClientLeftError(Exception):
    """The client disconnected before the answer."""


@dataclass
class ActiveRequest:
    """The texts of one request and the inbox of their events."""

    loaded: LoadedModel
    texts: list[ServedText]
    jobs: list[Job]
    """The same texts, those of a beam search together."""
    answer: AnswerFormat
    echoes: list[str]
    """The prompt repeated before each text; empty without `echo`."""
    inbox: Inbox
    prompt_tokens: int
    """Tokens of all prompts, each counted once for its `n` texts, as OpenAI does."""
    drawn: int = 1
    """Texts of each prompt."""
    n: int = 1
    """Texts of each prompt that are answered, the likeliest of them."""
    received: float = field(default_factory=time.perf_counter)
    outputs: list[CollectedText] = field(init=False)
    last_event: list[float] = field(init=False)
    """Time of each text's last event, for the latency histograms."""

    def __post_init__(self) -> None:
        self.outputs = [CollectedText() for _ in self.texts]
        self.last_event = [self.received for _ in self.texts]

    def reports(self) -> list[TokenReport | None]:
        """A fresh report of each text's tokens; None without log-probabilities."""
        pairs = zip(self.texts, self.echoes, strict=True)
        return [self.answer.report(text, echo) for text, echo in pairs]

    @property
    def entries(self) -> int:
        """Tokens and log-probabilities of the answer so far, about."""
        tokens = sum(len(output.tokens) for output in self.outputs)
        return tokens if self.answer.top is None else tokens * (self.answer.top + 2)

    def whole(self) -> bytes:
        """The complete answer in JSON."""
        chosen = self.chosen()
        reports = self.reports()
        return json_bytes(
            self.answer.whole(
                [self.outputs[index] for index in chosen],
                [self.echoes[index] for index in chosen],
                [reports[index] for index in chosen],
                self.usage(),
            )
        )

    def chosen(self) -> list[int]:
        """The texts to answer with: of `best_of` the n of the highest log-probability a token."""
        if self.drawn == self.n:
            return list(range(len(self.texts)))
        chosen: list[int] = []
        for first in range(0, len(self.texts), self.drawn):
            group = range(first, first + self.drawn)
            chosen += sorted(group, key=self.mean_logprob, reverse=True)[: self.n]
        return chosen

    def mean_logprob(self, index: int) -> float:
        """Log-probability of a text, in nats a token."""
        text = self.texts[index]
        tokens = self.outputs[index].tokens
        if text.score_prompt:
            tokens = tokens[len(text.continuation.ids) :]
        scored = [token.logprob for token in tokens if token.logprob is not None]
        # A prompt that is only scored has no text.
        return sum(scored) / max(1, len(scored))

    def usage(self) -> Usage:
        """Token counts so far."""
        collected = sum(len(output.tokens) for output in self.outputs)
        # Tokens of a scored prompt are collected too, but they are no part of the completion.
        scored = sum(len(text.continuation.ids) for text in self.texts if text.score_prompt)
        completion = collected - scored
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
        )
