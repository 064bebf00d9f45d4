"""OpenAI's answers, whole or in chunks, made from the scheduler's events."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from castalia.inference.decoding import FinishReason
from castalia.inference.language_model import LanguageModel
from castalia.serve.answer_json import FEW, json_text
from castalia.serve.protocol import (
    ChatAnswer,
    ChatChoice,
    Choice,
    CompletionAnswer,
    LogprobsOut,
    Usage,
)
from castalia.serve.scheduler import ServedText, StreamEvent
from castalia.serve.scored_tokens import ScoredToken
from castalia.serve.token_report import Candidate, ReportedToken, TokenReport, by_id

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
    id: str
    """Part of the answer's id behind cmpl- or chatcmpl-."""
    usage_follows: bool = False
    """Whether a stream ends with the token counts: its other chunks then say `usage: null`."""
    created: int = field(default_factory=lambda: int(time.time()))

    def report(self, served: ServedText, echo: str) -> TokenReport | None:
        """The report of one text's tokens; None if log-probabilities were not requested."""
        if self.top is None:
            return None
        return TokenReport(self.model, served, echo)

    def whole(
        self,
        texts: Sequence[CollectedText],
        echoes: Sequence[str],
        reports: Sequence[TokenReport | None],
        usage: Usage,
    ) -> dict[str, Any]:
        """The answer to a request without `stream`.

        `echoes[i]` is the prompt put before text i, `reports[i]` the fresh report of its tokens.
        """
        choices: list[Choice] = []
        replies: list[ChatChoice] = []
        logprobs: list[dict[str, Any] | None] = []
        for index, (text, echo, report) in enumerate(zip(texts, echoes, reports, strict=True)):
            written = echo + text.text
            tokens = None
            if report is not None:
                tokens = report.take(written, text.tokens, text.finish_reason)
            reason = openai_reason(text.finish_reason)
            logprobs.append(self.logprobs(tokens))
            if self.chat:
                message = {"role": "assistant", "content": written}
                replies.append(ChatChoice(index=index, message=message, finish_reason=reason))
            else:
                choices.append(Choice(index=index, text=written, finish_reason=reason))
        if self.chat:
            chat = ChatAnswer(**self.identity, choices=replies, usage=usage)
            answer = chat.model_dump(exclude={"choices": {"__all__": {"delta"}}})
        else:
            answer = CompletionAnswer(**self.identity, choices=choices, usage=usage).model_dump()
        for choice, scores in zip(answer["choices"], logprobs, strict=True):
            # Here: pydantic would read and copy each of them.
            choice["logprobs"] = scores
        return answer

    def logprobs(self, tokens: Sequence[ReportedToken] | None) -> dict[str, Any] | None:
        """Log-probabilities in the form of the endpoint; None if not requested."""
        if self.chat:
            return chat_logprobs(tokens)
        counted = completion_logprobs(tokens)
        return None if counted is None else dict(counted)

    def event_chunk(
        self, index: int, text: str, event: StreamEvent, report: TokenReport | None
    ) -> str:
        """The output of one event as a server-sent event; "" if there is nothing to send.

        Takes   text: that of the event, with an echo before it.
        """
        tokens = None
        if report is not None:
            tokens = report.take(text, event.tokens, event.finish_reason)
        # A step may end inside a character: nothing to send.
        if text or tokens or event.finish_reason is not None:
            return self.chunk(index, text, tokens, event.finish_reason)
        return ""

    def chunk(
        self,
        index: int,
        text: str,
        tokens: Sequence[ReportedToken] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> str:
        """New text and tokens of one choice as a server-sent event."""
        reason = openai_reason(finish_reason)
        if self.chat:
            reply = ChatChoice(
                index=index,
                delta={"content": text} if text else {},
                finish_reason=reason,
            )
            return self.chat_chunk(reply, tokens)
        choice = Choice(index=index, text=text, finish_reason=reason)
        answer = CompletionAnswer(**self.identity, choices=[choice])
        dumped = answer.model_dump(exclude=self.left_out)
        dumped["choices"][0]["logprobs"] = self.logprobs(tokens)
        return server_sent(dumped, is_long=tokens is not None and len(tokens) > FEW)

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that the answer and all chunks of a stream share."""
        endpoint = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{endpoint}-{self.id}", "created": self.created, "model": self.name}

    @property
    def left_out(self) -> set[str]:
        """Fields that the chunks of a stream do not have."""
        return set() if self.usage_follows else {"usage"}

    def chat_chunk(self, reply: ChatChoice, tokens: Sequence[ReportedToken] | None = None) -> str:
        """A part of one reply as a server-sent event."""
        answer = ChatAnswer(**self.identity, object="chat.completion.chunk", choices=[reply])
        # A client tells a chunk from the last one by `finish_reason: null`, so nulls are sent.
        left_out: dict[str, Any] = dict.fromkeys(self.left_out, True)
        left_out["choices"] = {"__all__": {"message"}}
        dumped = answer.model_dump(exclude=left_out)
        dumped["choices"][0]["logprobs"] = self.logprobs(tokens)
        return server_sent(dumped)

    def opening(self, index: int) -> str:
        """The first chunk of a chat reply, which carries the role."""
        reply = ChatChoice(index=index, delta={"role": "assistant", "content": ""})
        return self.chat_chunk(reply)

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk of a stream with `include_usage`."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        counts = {"object": kind, "choices": [], "usage": usage.model_dump()}
        return server_sent(self.identity | counts)


def completion_logprobs(tokens: Sequence[ReportedToken] | None) -> LogprobsOut | None:
    """Log-probabilities in the completion endpoint's form; None if not requested."""
    if tokens is None:
        return None
    # Constructed: reading each of them again would take as long as writing them.
    return LogprobsOut.model_construct(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[likeliest(token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


def likeliest(token: ReportedToken) -> dict[str, float] | None:
    """Log-probabilities of the likeliest tokens and of the token itself, by their text.

    Where two tokens have one text, the token itself keeps it, else the likelier one; the other
    stands under its id.
    """
    if token.logprob is None:
        return None
    own = Candidate(token.token, token.text, token.raw, token.logprob)
    others = [candidate for candidate in token.likeliest if candidate.token != token.token]
    by_text: dict[str, float] = {}
    for candidate in [own, *others]:
        key = candidate.text
        if key in by_text:
            key = by_id(candidate.token)
        by_text[key] = candidate.logprob
    return by_text


def chat_logprobs(tokens: Sequence[ReportedToken] | None) -> dict[str, Any] | None:
    """Log-probabilities in the chat endpoint's form; None if not requested.

    They are those of the message's content, as OpenAI says: its end is not among them.
    """
    if tokens is None:
        return None
    content = []
    for token in tokens:
        if token.closes:
            continue
        entry = chat_entry(token.text, token.raw, token.logprob)
        entry["top_logprobs"] = [
            chat_entry(candidate.text, candidate.raw, candidate.logprob)
            for candidate in token.likeliest
        ]
        content.append(entry)
    return {"content": content}


def chat_entry(text: str, raw: bytes, logprob: float | None) -> dict[str, Any]:
    """One token with its text, log-probability and UTF-8 bytes."""
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def openai_reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """OpenAI's name for a finish reason; None while the text goes on."""
    if reason is None:
        return None
    return FINISH_REASONS[reason]


def server_sent(body: dict[str, Any], *, is_long: bool = False) -> str:
    """A JSON body as one server-sent event; `is_long`: with many tokens."""
    return f"data: {json_text(body, is_long=is_long)}\n\n"
