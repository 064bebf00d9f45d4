"""Bodies of requests in OpenAI's API, with vLLM's extensions, as pydantic models.

Every field of both is here: honoured, or refused by name unless its value asks for nothing. Class
names and docstrings of the models appear on the OpenAPI page.

Source  OpenAI's API reference and openai-python 3.52; vLLM, entrypoints/openai: protocol.py of
        chat_completion and completion.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from castalia.core.errors import ConfigError
from castalia.corpus.message_content import texts_of_parts
from castalia.serve.fields import (
    MOST_DECODED,
    MOST_FORM,
    MOST_MESSAGES,
    MOST_STOPS,
    Biases,
    Body,
    Choices,
    Count,
    FormText,
    IdList,
    Labels,
    Objects,
    Only,
    Penalty,
    Plain,
    Positive,
    Seed,
    Several,
    Some,
    Stop,
    TokenId,
    Top,
    TopK,
    Unsupported,
    Variables,
    bounded,
    same,
)
from castalia.serve.forms import Form, ResponseFormat, StructuredOutputs, requested_form

TEMPLATE = "the chat template of the model's folder is used; leave it out"
LABEL = "A label of the client's; it changes no text."
NEUTRAL: dict[str, Any] = {"length_penalty": 1, "early_stopping": False}
"""What the fields of a beam search say where there is none."""
BIAS = "use logit_bias with -100 for their tokens"


PARTS: list[JsonValue] = [
    {"type": "string"},
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["text", "input_text", "output_text"]},
            "text": {"type": "string"},
        },
        "required": ["text"],
    },
    {
        "type": "object",
        "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
        "required": ["type", "refusal"],
    },
]
"""JSON schemas of the parts of a content, see `texts_of_parts`."""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = False
    """Send the token counts in a last chunk."""
    include_obfuscation: Unsupported = None
    continuous_usage_stats: Annotated[Any, Only(instead="use include_usage")] = None


class SamplingBody(Body):
    """Fields that both text endpoints share."""

    model: str | None = Field(
        None, description="A name from /v1/models; null takes the first model."
    )
    temperature: float | None = Field(
        1.0, ge=0, le=100, description="0 always takes the likeliest token."
    )
    top_p: float | None = Field(1.0, ge=0, le=1)
    n: Choices | None = 1
    stop: Stop | Annotated[list[Stop], bounded(MOST_STOPS)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = 0
    frequency_penalty: Penalty | None = 0
    logit_bias: Biases | None = Field(None, description="Added to the logits, by token id.")
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description=LABEL)

    # vLLM's extensions.
    top_k: TopK | None = Field(
        0, description="Draw from the k likeliest tokens; 0 and -1 draw from all."
    )
    min_p: float | None = Field(
        0, ge=0, le=1, description="Draw from tokens this many times as likely as the likeliest."
    )
    typical_p: float | None = Field(
        0,
        ge=0,
        le=1,
        description="Draw from tokens of nearly average information with this probability together;"
        " 0 and 1 draw from all.",
    )
    no_repeat_ngram_size: Count | None = Field(
        0, description="No sequence of this many tokens occurs twice in prompt and text."
    )
    repetition_penalty: float | None = Field(
        1.0, ge=0.01, le=100, description="Above 1 avoids the tokens of prompt and text."
    )
    stop_token_ids: Annotated[IdList, Plain()] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = Field(
        False, description="Continue after the tokens that end the model's texts."
    )
    min_tokens: Count | None = Field(0, description="Nothing ends the text before.")
    allowed_token_ids: Annotated[IdList, Plain()] | None = None
    skip_special_tokens: bool | None = Field(
        False, description="Leave the names of special tokens out of the text."
    )
    spaces_between_special_tokens: bool | None = Field(
        None, description="No effect: no space is ever added."
    )
    add_special_tokens: bool | None = Field(
        False, description="Must be false for a tokenizer that would add some."
    )
    truncate_prompt_tokens: Positive | None = Field(
        None, description="Read only this many tokens of the prompt, the last ones."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="right reads the first tokens of the prompt instead."
    )
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | FormText | None = None
    guided_regex: FormText | None = None
    guided_choice: Annotated[list[str], bounded(MOST_FORM)] | None = None
    guided_grammar: FormText | None = None
    guided_whitespace_pattern: FormText | None = None
    guided_decoding_backend: Annotated[Any, Only("auto", "guidance")] = None
    request_id: str | None = Field(None, max_length=256, description="Part of the answer's id.")
    session_id: str | None = Field(None, description=LABEL)

    use_beam_search: bool | None = Field(
        False, description="The n best texts of a search with best_of beams, or n."
    )
    length_penalty: float | None = Field(
        1.0, description="Power of the length that divides the score of a beam."
    )
    early_stopping: bool | Literal["never"] | None = Field(
        False, description="End a beam search once as many texts as beams have ended."
    )

    # What this server cannot do.
    bad_words: Annotated[Any, Only(instead=BIAS)] = None
    prompt_logprobs: Annotated[
        Any, Only(instead="use echo=true with logprobs in /v1/completions")
    ] = None
    logprob_token_ids: Unsupported = None
    return_tokens_as_token_ids: Unsupported = None
    return_token_ids: Unsupported = None
    return_token_offsets: Unsupported = None
    return_mm_kwargs: Annotated[Any, Only(True)] = None
    routed_experts_prompt_start: Annotated[Any, Only(0)] = None
    repetition_detection: Unsupported = None
    thinking_token_budget: Annotated[Any, Only(-1)] = None
    structural_tag: Unsupported = None
    logits_processors: Unsupported = None
    watermarking: Unsupported = None
    priority: Annotated[Any, Only(0)] = None
    stream_interval: Annotated[Any, Only(1)] = None
    cache_salt: Unsupported = None
    kv_transfer_params: Unsupported = None
    ec_transfer_params: Unsupported = None
    vllm_xargs: Unsupported = None
    usage: Annotated[Any, Only(instead="use stream_options")] = None

    @field_validator("use_beam_search")
    @classmethod
    def is_whole(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        """A search neither streams nor draws."""
        if not value:
            return value
        if info.data.get("stream"):
            raise ValueError("a beam search knows its texts only at the end; leave out stream")
        temperature = info.data.get("temperature")
        # 1 is what clients send that never ask for anything else.
        if temperature not in (None, 0, 1):
            raise ValueError(f"draws no tokens; leave out temperature={temperature}")
        return value

    @field_validator("length_penalty", "early_stopping")
    @classmethod
    def goes_with_a_search(cls, value: Any, info: ValidationInfo) -> Any:
        """Alone, they would be dropped."""
        # By `same`: Python's True == 1 and 0.0 == False are no neutral values here.
        neutral = NEUTRAL[str(info.field_name)]
        if value is None or same(value, neutral) or info.data.get("use_beam_search"):
            return value
        raise ValueError("needs use_beam_search=true")

    @property
    def width(self) -> int:
        """Texts that are generated for each prompt, or the beams of its search."""
        return self.n or 1

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

    @property
    def form(self) -> Form | None:
        """The form that the text must have; None for any text.

        Raises  ConfigError if several fields ask for one.
        """
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        return requested_form(
            self.response_format, self.structured_outputs, guided, self.guided_whitespace_pattern
        )


def null_for_false(value: Any) -> Any:
    """`logprobs: false` of the chat endpoint, which some clients send to this one as well."""
    return None if value is False else value


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[
        str
        | Annotated[list[str], Several]
        | Annotated[list[TokenId], Some]
        | Annotated[list[Annotated[list[TokenId], Some]], Several],
        Plain(),
    ] = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of ids."
    )
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Annotated[Top | Literal[False] | None, AfterValidator(null_for_false)] = None
    best_of: Positive | None = Field(
        None, description="Generate this many texts for each prompt; answer with the n likeliest."
    )
    suffix: Unsupported = None
    prompt_embeds: Unsupported = None

    @field_validator("best_of")
    @classmethod
    def chooses_among_several(cls, value: int | None, info: ValidationInfo) -> int | None:
        """There are at least n texts, and a stream cannot wait for the best of more."""
        n = info.data.get("n") or 1
        if value in (None, 1, n):
            return value
        if value < n:
            raise ValueError(f"must be at least n={n}")
        if info.data.get("stream"):
            raise ValueError("the best texts are known only at the end; leave out stream")
        return value

    @property
    def width(self) -> int:
        """See `SamplingBody`."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each a string or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(Body):
    """One turn of a conversation. All of its keys reach the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: Any = Field(
        None,
        description="A string, a list of text parts, or null beside tool_calls.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": PARTS}},
                {"type": "null"},
            ]
        },
    )
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def is_text(cls, value: Any) -> Any:
        """A string, a list of parts of text, or null."""
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("expected a string, a list of text parts, or null")
        try:
            texts_of_parts(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = False
    top_logprobs: Top | None = None
    tools: Objects | None = Field(
        None, description="Given to the chat template; calls are part of the reply's text."
    )
    tool_choice: Annotated[Any, Only("auto", "none", instead="only auto and none are")] = None
    parallel_tool_calls: Annotated[Any, Only(True, empty=False)] = None
    functions: Annotated[Any, Only(instead="use tools")] = None
    function_call: Annotated[Any, Only("auto", "none", instead="use tools")] = None
    metadata: Labels | None = Field(None, description=LABEL)
    safety_identifier: str | None = Field(None, description=LABEL)
    prompt_cache_key: str | None = Field(None, description=LABEL)
    prompt_cache_retention: Annotated[Any, Only("in_memory")] = None
    prompt_cache_options: Unsupported = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Unsupported = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    verbosity: Annotated[Any, Only("medium")] = None
    # Here an empty object asks for a search.
    web_search_options: Annotated[Any, Only(empty=False)] = None
    reasoning_effort: str | None = Field(
        None, description="Given to the chat template, if it asks for one."
    )

    # vLLM's extensions.
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's reply: true, unless a message is continued."
    )
    continue_final_message: bool | None = Field(
        False, description="Continue the last message in place of a reply."
    )
    documents: Objects | None = Field(
        None, description="Given to the chat template, if it asks for them."
    )
    chat_template_kwargs: Variables | None = Field(
        None, description="More variables of the chat template."
    )
    chat_template: Annotated[Any, Only(instead=TEMPLATE)] = None
    echo: Annotated[Any, Only(instead="use continue_final_message")] = None
    include_reasoning: Annotated[Any, Only(True)] = None
    return_prompt_text: Unsupported = None
    media_io_kwargs: Unsupported = None
    mm_processor_kwargs: Unsupported = None

    @field_validator("top_logprobs")
    @classmethod
    def goes_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Alone, it would be dropped."""
        if value and not info.data.get("logprobs"):
            raise ValueError("needs logprobs=true")
        return value


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(
        False, description="Must be false for a tokenizer that would add some."
    )
    return_token_strs: Unsupported = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], bounded(MOST_DECODED), Plain(MOST_DECODED)]
