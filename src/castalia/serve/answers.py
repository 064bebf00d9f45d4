"""OpenAI's answers, whole or in chunks, made from the scheduler's events."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from castalia.inference.decoding import FinishReason
from castalia.inference.language_model import LanguageModel
from castalia.serve.protocol import (
    ChatAnswer,
    ChatChoice,
    Choice,
    CompletionAnswer,
    LogprobsOut,
    Usage,
)
from castalia.serve.scheduler import ScoredToken, StreamEvent

# OpenAI knows two reasons. A text that fills the model's context ends by length as well.
FINISH_REASONS: dict[FinishReason, Literal["stop", "length"]] = {
    "eod": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
}


@dataclass
class CollectedText:
    """The output of one text so far."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: StreamEvent) -> None:
        """Append the output of one event."""
        self.pieces.append(event.text)
        self.tokens += event.tokens
        self.finish_reason = event.finish_reason

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class AnswerFormat:
    """Formats the answer to one request. All chunks of a stream share its id and time."""

    model: LanguageModel
    name: str
    chat: bool
    top: int | None
    """Number of likeliest tokens reported at each position; None omits log-probabilities."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, texts: Sequence[CollectedText], echoes: Sequence[str], usage: Usage
    ) -> CompletionAnswer | ChatAnswer:
        """The answer to a request without `stream`; `echoes[i]` is the prompt put before text i."""
        if self.chat:
            return self.whole_chat(texts, usage)
        choices = []
        for index, (text, echo) in enumerate(zip(texts, echoes, strict=True)):
            choice = Choice(
                index=index,
                text=echo + text.text,
                logprobs=self.logprobs(text.tokens),
                finish_reason=openai_reason(text.finish_reason),
            )
            choices.append(choice)
        return CompletionAnswer(
            id=f"cmpl-{self.id}",
            created=self.created,
            model=self.name,
            choices=choices,
            usage=usage,
        )

    def whole_chat(self, texts: Sequence[CollectedText], usage: Usage) -> ChatAnswer:
        """The answer to a chat request without `stream`."""
        choices = []
        for index, text in enumerate(texts):
            choice = ChatChoice(
                index=index,
                message={"role": "assistant", "content": text.text},
                logprobs=self.chat_logprobs(text.tokens),
                finish_reason=openai_reason(text.finish_reason),
            )
            choices.append(choice)
        return ChatAnswer(
            id=f"chatcmpl-{self.id}",
            created=self.created,
            model=self.name,
            choices=choices,
            usage=usage,
        )

    def chunk(self, index: int, event: StreamEvent, offset: int) -> str:
        """One event as a server-sent event; `offset` counts the characters before its text."""
        finish_reason = openai_reason(event.finish_reason)
        if self.chat:
            reply = ChatChoice(
                index=index,
                delta={"content": event.text} if event.text else {},
                logprobs=self.chat_logprobs(event.tokens),
                finish_reason=finish_reason,
            )
            return self.chat_chunk([reply])
        choice = Choice(
            index=index,
            text=event.text,
            logprobs=self.logprobs(event.tokens, offset),
            finish_reason=finish_reason,
        )
        answer = CompletionAnswer(
            id=f"cmpl-{self.id}", created=self.created, model=self.name, choices=[choice]
        )
        return server_sent(answer.model_dump(exclude={"usage"}))

    def chat_chunk(self, choices: list[ChatChoice]) -> str:
        """Chat choices as a server-sent event."""
        answer = ChatAnswer(
            id=f"chatcmpl-{self.id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.name,
            choices=choices,
        )
        return server_sent(answer.model_dump(exclude_none=True, exclude={"usage"}))

    def opening(self, index: int) -> str:
        """The first chunk of a chat reply, which carries the role."""
        reply = ChatChoice(index=index, delta={"role": "assistant", "content": ""})
        return self.chat_chunk([reply])

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk of a stream with `include_usage`."""
        identity = {"id": f"cmpl-{self.id}", "object": "text_completion"}
        if self.chat:
            identity = {"id": f"chatcmpl-{self.id}", "object": "chat.completion.chunk"}
        body = {
            **identity,
            "created": self.created,
            "model": self.name,
            "choices": [],
            "usage": usage.model_dump(),
        }
        return server_sent(body)

    def logprobs(self, tokens: Sequence[ScoredToken], offset: int = 0) -> LogprobsOut | None:
        """Log-probabilities in the completion endpoint's form; None if not requested."""
        if self.top is None:
            return None
        out = LogprobsOut(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for scored in tokens:
            text = self.model.decode([scored.token])
            likeliest = None
            if scored.logprob is not None:
                likeliest = self.likeliest(scored)
            out.tokens.append(text)
            out.token_logprobs.append(scored.logprob)
            out.top_logprobs.append(likeliest)
            out.text_offset.append(offset)
            offset += len(text)
        return out

    def likeliest(self, scored: ScoredToken) -> dict[str, float]:
        """Log-probabilities of the likeliest tokens and of the token itself, by their text.

        Several tokens may decode to one text, U+FFFD for instance; the likeliest of them counts.
        """
        candidates = list(scored.top)
        if scored.logprob is not None:
            candidates.append((scored.token, scored.logprob))
        by_text: dict[str, float] = {}
        for token, logprob in candidates:
            text = self.model.decode([token])
            by_text[text] = max(by_text.get(text, float("-inf")), logprob)
        return by_text

    def chat_logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """Log-probabilities in the chat endpoint's form; None if not requested."""
        if self.top is None:
            return None
        content = []
        for scored in tokens:
            entry = self.chat_entry(scored.token, scored.logprob)
            entry["top_logprobs"] = [self.chat_entry(*candidate) for candidate in scored.top]
            content.append(entry)
        return {"content": content}

    def chat_entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """One token with its text, log-probability and UTF-8 bytes."""
        text = self.model.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def openai_reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """OpenAI's name for a finish reason; None while the text goes on."""
    if reason is None:
        return None
    return FINISH_REASONS[reason]


def server_sent(body: dict[str, Any]) -> str:
    """A JSON body as one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
