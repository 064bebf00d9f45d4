"""Events of the scheduler as OpenAI's answers, whole or in chunks."""

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
from castalia.serve.scheduler import Event, Scored

REASONS: dict[FinishReason, Literal["stop", "length"]] = {
    "eod": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
}


@dataclass
class Made:
    """What one job has given so far."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: Event) -> None:
        """Take one event."""
        self.pieces.append(event.text)
        self.tokens += event.tokens
        self.finish_reason = event.finish_reason


@dataclass(frozen=True)
class Answer:
    """The heading that all parts of one answer share."""

    model: LanguageModel
    name: str
    chat: bool
    top: int | None
    """Likeliest tokens to tell; None tells no log-probabilities."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, texts: Sequence[Made], echoes: Sequence[str], usage: Usage
    ) -> CompletionAnswer | ChatAnswer:
        """The answer to a request without stream; `echoes` are the prompts to be repeated before each text."""
        if self.chat:
            replies = [
                ChatChoice(
                    index=index,
                    message={"role": "assistant", "content": "".join(made.pieces)},
                    logprobs=self.chat_logprobs(made.tokens),
                    finish_reason=reason(made.finish_reason),
                )
                for index, made in enumerate(texts)
            ]
            return ChatAnswer(
                id=f"chatcmpl-{self.id}",
                created=self.created,
                model=self.name,
                choices=replies,
                usage=usage,
            )
        choices = [
            Choice(
                index=index,
                text=echo + "".join(made.pieces),
                logprobs=self.logprobs(made.tokens),
                finish_reason=reason(made.finish_reason),
            )
            for index, (made, echo) in enumerate(zip(texts, echoes, strict=True))
        ]
        return CompletionAnswer(
            id=f"cmpl-{self.id}",
            created=self.created,
            model=self.name,
            choices=choices,
            usage=usage,
        )

    def chunk(self, index: int, event: Event, offset: int) -> str:
        """One event as a server-sent event; `offset` is the length of the text before it."""
        finish = reason(event.finish_reason)
        if self.chat:
            delta = {"content": event.text} if event.text else {}
            reply = ChatChoice(
                index=index,
                delta=delta,
                logprobs=self.chat_logprobs(event.tokens),
                finish_reason=finish,
            )
            return self.chat_chunk([reply])
        choice = Choice(
            index=index,
            text=event.text,
            logprobs=self.logprobs(event.tokens, offset),
            finish_reason=finish,
        )
        answer = CompletionAnswer(
            id=f"cmpl-{self.id}", created=self.created, model=self.name, choices=[choice]
        )
        return sse(answer.model_dump(exclude={"usage"}))

    def chat_chunk(self, choices: list[ChatChoice]) -> str:
        """Chat choices as a server-sent event."""
        answer = ChatAnswer(
            id=f"chatcmpl-{self.id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.name,
            choices=choices,
        )
        return sse(answer.model_dump(exclude_none=True, exclude={"usage"}))

    def opening(self, index: int) -> str:
        """The first chunk of a reply, which says who speaks."""
        return self.chat_chunk(
            [ChatChoice(index=index, delta={"role": "assistant", "content": ""})]
        )

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk, when include_usage asks for it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        body = {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.name,
        }
        return sse(body | {"choices": [], "usage": usage.model_dump()})

    def logprobs(self, tokens: Sequence[Scored], offset: int = 0) -> LogprobsOut | None:
        """The log-probabilities of tokens, None when nobody asked."""
        if self.top is None:
            return None
        out = LogprobsOut(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for scored in tokens:
            text = self.model.decode([scored.token])
            out.tokens.append(text)
            out.token_logprobs.append(scored.logprob)
            out.top_logprobs.append(None if scored.logprob is None else self.named(scored))
            out.text_offset.append(offset)
            offset += len(text)
        return out

    def named(self, scored: Scored) -> dict[str, float]:
        """The likeliest tokens by their texts, and the token itself; of two with one text the likelier counts."""
        found: dict[str, float] = {}
        own = [(scored.token, scored.logprob)] if scored.logprob is not None else []
        for token, logprob in [*scored.top, *own]:
            text = self.model.decode([token])
            found[text] = max(found.get(text, float("-inf")), logprob)
        return found

    def chat_logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        """The same in the chat endpoint's form."""
        if self.top is None:
            return None
        return {
            "content": [
                self.chat_entry(scored.token, scored.logprob)
                | {
                    "top_logprobs": [
                        self.chat_entry(token, logprob) for token, logprob in scored.top
                    ]
                }
                for scored in tokens
            ]
        }

    def chat_entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        """One token with its text, log-probability and bytes."""
        text = self.model.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def reason(found: FinishReason | None) -> Literal["stop", "length"] | None:
    """OpenAI's word for why a text ended."""
    return None if found is None else REASONS[found]


def sse(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
