"""Types of request fields: integers as JSON has them, lists with bounds, and fields that are not
supported."""

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PrivateAttr,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from castalia.inference.sampling import LARGEST_SEED, SMALLEST_SEED

MOST_PROMPTS = 2048
"""Prompts in one request; OpenAI's limit."""
MOST_IDS = 1 << 19
"""Ids in one list: more than any vocabulary or context has."""
MOST_DECODED = 1 << 17
"""Ids that /detokenize takes at a time."""
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
"""Of a stop string: each is looked for after every token."""
MOST_MESSAGES = 8192
MOST_BIASES = 1 << 16
MOST_NAMES = 1024
"""Entries of what a client names: labels, variables of a template, tools, calls of a message."""
MOST_FORM = 1 << 16
"""Characters of a regular expression or grammar, and choices; see inference/grammar.py."""
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
LARGEST_ID = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID, description=TOKEN), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1), BeforeValidator(whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES, description=CHOICES), BeforeValidator(whole)]
Several = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True, description=TEXTS)
Some = Field(min_length=1, max_length=MOST_IDS, fail_fast=True)
Top = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(whole)]
Seed = Annotated[
    int, Field(ge=SMALLEST_SEED, le=LARGEST_SEED, description=SEED), BeforeValidator(whole)
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Entries:
    """Metadata of an object: at most `most` entries, of which the first wrong ones are told.

    pydantic would keep an error for each of them.
    """

    at_a_time = 64

    def __init__(self, most: int) -> None:
        self.most = most

    def check(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        """The entries, each checked."""
        if not isinstance(value, dict) or len(value) <= self.at_a_time:
            return handler(value)
        if len(value) > self.most:
            raise ValueError(f"has {len(value):,} entries; at most {self.most:,} are taken")
        entries = list(value.items())
        checked: dict[str, Any] = {}
        for start in range(0, len(entries), self.at_a_time):
            checked |= handler(dict(entries[start : start + self.at_a_time]))
        return checked

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"maxProperties": self.most}


class Plain:
    """Metadata of a list of ids, or of several: lists as they should be are taken as they are.

    pydantic would call `whole` for each id and copy the list. What is not plain takes that way,
    which names the first error, or reads 1.0 as 1.
    """

    def __init__(self, most: int = MOST_IDS) -> None:
        self.most = most

    def check(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        """The value, checked."""
        if type(value) is list and 0 < len(value) <= self.most:
            if are_ids(value):
                return value
            if len(value) <= MOST_PROMPTS and all(map(are_ids, value)):
                return value
        return handler(value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self.check, handler(source))


def are_ids(value: Any) -> bool:
    """Whether this is a list of some token ids, all of them plain numbers."""
    if type(value) is not list or not 0 < len(value) <= MOST_IDS:
        return False
    # In slices: the functions of C let no other thread run.
    for start in range(0, len(value), 1 << 12):
        part = value[start : start + (1 << 12)]
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) > LARGEST_ID:
            return False
    return True


def bounded(most: int) -> Any:
    """Metadata of a list: at most `most` items, of which the first wrong one is told."""
    return Field(max_length=most, fail_fast=True)


Biases = Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Bias], Entries(MOST_BIASES)]
IdList = Annotated[list[TokenId], bounded(MOST_IDS)]
Stop = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS)]
FormText = Annotated[str, Field(max_length=MOST_FORM)]
Objects = Annotated[list[dict[str, Any]], bounded(MOST_NAMES)]
Variables = Annotated[dict[str, Any], Entries(MOST_NAMES)]
Labels = Annotated[dict[str, str], Entries(MOST_NAMES)]


class Body(BaseModel):
    """A request. Types are exact; unknown fields are errors, as in OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    _weight: int = PrivateAttr(default=0)

    @property
    def weight(self) -> int:
        """Bytes of the request; 0 if it did not arrive as bytes."""
        return self._weight

    def weighs(self, size: int) -> Self:
        """The same, of a request of `size` bytes."""
        self._weight = size
        return self

    @model_validator(mode="before")
    @classmethod
    def one_unknown(cls, value: Any) -> Any:
        """Of the fields that are unknown keep the first: pydantic keeps an error for each."""
        if not isinstance(value, dict) or cls.model_config.get("extra") != "forbid":
            return value
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in value if name not in names]
        if len(unknown) > 1:
            names.add(unknown[0])
            value = {name: kept for name, kept in value.items() if name in names}
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
