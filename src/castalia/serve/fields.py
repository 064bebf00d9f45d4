"""Types of request fields: integers as JSON has them, and fields that are not supported."""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from castalia.core.errors import ConfigError
from castalia.core.unicode import require_unicode_in
from castalia.inference.sampling import LARGEST_SEED, SMALLEST_SEED

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
SEED = "Any int64."
# Ids and counts are C ints in some engines; a larger one would overflow there.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, description=TOKEN), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES, description=CHOICES), BeforeValidator(whole)]
Several = Field(min_length=1, max_length=MOST_PROMPTS, description=TEXTS)
Top = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(whole)]
Seed = Annotated[
    int, Field(ge=SMALLEST_SEED, le=LARGEST_SEED, description=SEED), BeforeValidator(whole)
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Bias]


class Body(BaseModel):
    """A request. Types are exact; unknown fields are errors, as in OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def valid_unicode(cls, value: Any) -> Any:
        """Refuse half of a surrogate pair in any string, before anything echoes or encodes it."""
        try:
            require_unicode_in(value, "the request")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value


NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values that ask for nothing."""


class Only:
    """Metadata of a field that is not supported; values that ask for nothing pass.

    neutral   further values that ask for nothing. empty: whether those of NOTHING do; null always
              does. instead: what to use in place of the field.
    """

    def __init__(self, *neutral: Any, empty: bool = True, instead: str = "leave it out") -> None:
        self.values = [*(NOTHING if empty else [None]), *neutral]
        self.instead = instead

    def check(self, value: Any) -> Any:
        """The value, if it asks for nothing."""
        if any(same(value, neutral) for neutral in self.values):
            return value
        raise ValueError(f"not supported by this server; {self.instead}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": self.values, "description": "Not supported."}


Unsupported = Annotated[Any, Only()]
"""A field that this server cannot honour, without another way to the same."""


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; Python's true == 1 is not."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
