"""Bodies of answers in OpenAI's API, as pydantic models.

Class names and docstrings of the models appear on the OpenAPI page.
"""

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LogprobsOut(BaseModel):
    """One entry for each token; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One generated text."""

    index: int
    text: str
    logprobs: LogprobsOut | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionAnswer(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ChatChoice(BaseModel):
    """One reply: a `message`, or a `delta` in a stream."""

    index: int
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatAnswer(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One model of the server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "castalia"


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    """Answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok", "stopping"]
    models: list[str]
    """Models in memory."""
    loading: list[str] = []
    """Models that requests wait for."""
    leaving: list[str] = []
    """Models that finish their texts to make room, or whose memory is not free yet."""
    running: int
    """Texts being generated."""
    waiting: int
    """Texts in the queue."""


class ErrorBody(BaseModel):
    """The error of a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Answer with any status but 200."""

    error: ErrorBody
