"""The form that a request asks its text to have: OpenAI's `response_format`, vLLM's
`structured_outputs` and the older `guided_…` fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from castalia.core.errors import ConfigError
from castalia.inference.grammar import BLANKS, Grammar, Grammars
from castalia.serve.fields import MOST_FORM, Body, FormText, Unsupported, bounded

ANY_OBJECT = {"type": "object"}
"""The schema of `json_object`."""


class SchemaFormat(Body):
    """The `json_schema` of a response format."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="No effect: every schema is kept exactly.")


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def has_its_schema(self) -> "ResponseFormat":
        """The type json_schema names a schema."""
        schema = self.json_schema
        if self.type == "json_schema" and (schema is None or schema.schema_ is None):
            raise ValueError("the type json_schema needs json_schema.schema")
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar and json_object."""

    json_: dict[str, Any] | FormText | None = Field(None, alias="json")
    regex: FormText | None = None
    choice: Annotated[list[str], bounded(MOST_FORM)] | None = None
    grammar: FormText | None = None
    json_object: bool | None = None
    whitespace_pattern: FormText | None = None
    disable_any_whitespace: bool | None = False
    disable_fallback: bool | None = Field(None, description="No effect: there is no fallback.")
    structural_tag: Unsupported = None
    disable_additional_properties: Unsupported = None


@dataclass(frozen=True)
class Form:
    """A form before it is compiled."""

    kind: str
    """json, regex, choice or grammar."""
    value: Any
    blanks: str | None = BLANKS
    """Regular expression of the white space in JSON; None for none."""

    def compiled(self, grammars: Grammars) -> Grammar:
        """The grammar of the form.

        Raises  ConfigError if it is not valid.
        """
        if self.kind == "json":
            return grammars.json(self.value, blanks=self.blanks)
        compile_form = {
            "regex": grammars.regex,
            "choice": grammars.choice,
            "grammar": grammars.grammar,
        }
        return compile_form[self.kind](self.value)


def requested_form(
    format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    guided: Mapping[str, Any],
    guided_blanks: str | None,
) -> Form | None:
    """The form that a request's fields ask for; None if they ask for none.

    Raises  ConfigError if they ask for several.
    """
    forms: dict[str, Form] = {}
    if format is not None and format.type != "text":
        schema = ANY_OBJECT
        if format.json_schema is not None and format.json_schema.schema_ is not None:
            schema = format.json_schema.schema_
        forms["response_format"] = Form("json", schema)
    if structured is not None:
        forms |= structured_forms(structured)
    for kind, value in guided.items():
        # An empty schema is a schema: any JSON. An empty list or text asks for nothing.
        if value or value == {}:
            forms[f"guided_{kind}"] = Form(kind, value, guided_blanks or BLANKS)
    if len(forms) > 1:
        raise ConfigError(f"{' and '.join(forms)} each give the text a form; give one of them")
    return next(iter(forms.values()), None)


def structured_forms(asked: StructuredOutputs) -> dict[str, Form]:
    """The forms of `structured_outputs`, by the name of their field."""
    blanks: str | None = asked.whitespace_pattern or BLANKS
    if asked.disable_any_whitespace:
        blanks = None
    values = {
        "json": asked.json_,
        "regex": asked.regex,
        "choice": asked.choice,
        "grammar": asked.grammar,
    }
    forms = {
        f"structured_outputs.{kind}": Form(kind, value, blanks)
        for kind, value in values.items()
        if value or value == {}
    }
    if asked.json_object:
        forms["structured_outputs.json_object"] = Form("json", ANY_OBJECT, blanks)
    return forms
