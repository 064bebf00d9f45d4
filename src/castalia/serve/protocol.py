"""Bodies of requests and answers in OpenAI's API, as pydantic models.

Class names and docstrings of the models appear on the OpenAPI page.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from castalia.core.errors import ConfigError
from castalia.core.unicode import require_unicode_in

MOST_PROMPTS = 2048
"""Prompts in one request; OpenAI's limit."""
MOST_CHOICES = 64
MOST_TOP_LOGPROBS = 20
"""OpenAI's limit of the chat endpoint; its completions allow 5."""


def whole(value: Any) -> Any:
    """1.0 as 1: JSON has one type of number, and some clients write integers as floats."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# The app finds these schemas on the OpenAPI page by their descriptions, and lowers their bounds.
TOKEN = "A token id."
TEXTS = "At most as many texts as can wait in the queue; each counts n times."
CHOICES = "Texts for each prompt; each waits in the queue."
# Ids and counts are C ints in some engines; a larger one would overflow there.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, description=TOKEN), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES, description=CHOICES), BeforeValidator(whole)]
Several = Field(min_length=1, max_length=MOST_PROMPTS, description=TEXTS)
Top = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(whole)]
Zero = Annotated[float, Field(ge=0, le=0)]
Seed = Annotated[int, Field(ge=0, lt=2**48), BeforeValidator(whole)]


class Body(BaseModel):
    """A request. Types are exact; unknown keys are ignored, as OpenAI does."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def valid_unicode(cls, value: Any) -> Any:
        """Refuse half of a surrogate pair in any string, before anything echoes or encodes it."""
        try:
            require_unicode_in(value, "the request")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    """Send the token counts in a last chunk."""


class SamplingBody(Body):
    """Fields that both text endpoints share."""

    model: str | None = Field(
        None, description="A name from /v1/models; null takes the first model."
    )
    temperature: float | None = Field(
        1.0, ge=0, le=100, description="0 always takes the likeliest token."
    )
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: Count | None = Field(
        0, description="Extension: draw from the k likeliest tokens; 0 draws from all."
    )
    n: Choices | None = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        False, description="Extension: continue after the end-of-document token."
    )
    presence_penalty: Zero | None = Field(0, description="Not supported: must be 0.")
    frequency_penalty: Zero | None = Field(0, description="Not supported: must be 0.")
    logit_bias: dict[str, float] | None = Field(
        None, max_length=0, description="Not supported: must be empty."
    )

    @property
    def usage_follows(self) -> bool:
        """Whether the answer is a stream that ends with the token counts."""
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        if isinstance(self.stop, str):
            return [self.stop]
        return list(self.stop or ())


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Several]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Several]
    ) = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of ids."
    )
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Top | None = None
    best_of: Literal[1] | None = Field(None, description="Not supported: must be 1.")
    suffix: str | None = Field(None, max_length=0, description="Not supported: must be empty.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a string or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(Body):
    """One turn of a conversation."""

    role: str = Field(min_length=1)
    content: str


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = False
    top_logprobs: Top | None = None


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = False
    """Accepted for compatibility with vLLM; has no effect, as no tokenizer here adds any."""


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


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
