"""The bodies of requests and answers, as OpenAI's API has them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_PROMPTS = 2048
MOST_CHOICES = 64
MOST_TOP_LOGPROBS = 20


def whole(value: Any) -> Any:
    """1.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TOKEN = "A token's id."
TEXTS = "At most as many as can wait; n times as many count."
CHOICES = "Texts for each prompt, each of which waits."
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, description=TOKEN), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES, description=CHOICES), BeforeValidator(whole)]
Several = Field(min_length=1, max_length=MOST_PROMPTS, description=TEXTS)
Top = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(whole)]
Zero = Annotated[float, Field(ge=0, le=0)]
Seed = Annotated[int, Field(ge=0, lt=2**48), BeforeValidator(whole)]


class Body(BaseModel):
    """What a client sends: types are exact, and keys that are not known are ignored, as OpenAI does."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """Options of stream=true."""

    include_usage: bool = False
    """A last chunk carries the token counts."""


class Drawn(Body):
    """How tokens are drawn; both endpoints share it."""

    model: str | None = Field(None, description="One of /v1/models; null takes the first.")
    temperature: float | None = Field(
        1.0, ge=0, le=100, description="0 takes the most likely token each time."
    )
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: Count | None = Field(0, description="Not OpenAI's: draw from the k likeliest; 0 is off.")
    n: Choices | None = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        False, description="Not OpenAI's: go on after the end-of-document token."
    )
    presence_penalty: Zero | None = Field(0, description="Not supported: must be 0.")
    frequency_penalty: Zero | None = Field(0, description="Not supported: must be 0.")
    logit_bias: dict[str, float] | None = Field(
        None, max_length=0, description="Not supported: must be empty."
    )

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionRequest(Drawn):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Several]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Several]
    ) = Field(description="A text, texts, ids, or lists of ids.")
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Top | None = None
    best_of: Literal[1] | None = Field(None, description="Not supported: must be 1.")
    suffix: str | None = Field(None, max_length=0, description="Not supported: must be empty.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(Body):
    """One turn of a conversation."""

    role: str = Field(min_length=1)
    content: str


class ChatRequest(Drawn):
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
    """Taken for compatibility: no tokenizer here adds any."""


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
    """One entry a token; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: LogprobsOut | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionAnswer(BaseModel):
    """What /v1/completions answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ChatChoice(BaseModel):
    """One reply: `message`, or `delta` in a stream."""

    index: int
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatAnswer(BaseModel):
    """What /v1/chat/completions answers."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "castalia"


class ModelList(BaseModel):
    """What /v1/models answers."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    """What /tokenize answers."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """What /detokenize answers."""

    prompt: str


class Health(BaseModel):
    """What /health answers."""

    status: Literal["ok", "stopping"]
    models: list[str]
    """Models that are in memory."""
    running: int
    waiting: int


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is not 200."""

    error: ErrorBody
