"""What a message says: a string, nothing, or a list of parts, in the form a template expects."""

from collections.abc import Mapping, Sequence
from typing import Any

from castalia.core.errors import ConfigError, quoted

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of an assistant's reasoning. Templates read the first; some read the second."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text in OpenAI's APIs, and the key of the text."""
BETWEEN_PARTS = "\n"
"""Joins the texts of parts for a template that expects a string, as vLLM and llama.cpp do."""
STRING = "string"
PARTS = "parts"
EITHER = "either"
Message = dict[str, Any]


def texts_of_parts(parts: Sequence[Any]) -> list[str]:
    """The text of each part of a content: a string, or an object with a type.

    Raises  ConfigError naming a part that is not text.
    """
    texts = []
    for number, part in enumerate(parts, start=1):
        text = part
        if isinstance(part, Mapping):
            # A part without a type is text, as in the files of some datasets.
            kind = str(part.get("type", "text"))
            if kind not in TEXT_PARTS:
                raise ConfigError(
                    f"part {number} of the content has the type {quoted(kind)}; expected text, as"
                    " the model reads nothing else"
                )
            text = part.get(TEXT_PARTS[kind])
        if not isinstance(text, str):
            raise ConfigError(
                f"part {number} of the content has no text; expected"
                ' {"type": "text", "text": "…"}'
            )
        texts.append(text)
    return texts


def in_form(messages: Sequence[Message], form: str) -> list[Message]:
    """Messages with contents in the form that a template expects: STRING, PARTS or EITHER.

    Raises  ConfigError naming a part that is not text.
    """
    converted = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            texts = texts_of_parts(content)
            content = [{"type": "text", "text": text} for text in texts]
            if form == STRING:
                content = BETWEEN_PARTS.join(texts)
        elif isinstance(content, str) and form == PARTS:
            content = [{"type": "text", "text": content}]
        if content is not None:
            # A copy, as the caller's message may be rendered again, in another form.
            message = message | {"content": content}
        converted.append(message)
    return converted


def without_nulls(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages without keys whose value is null, and with reasoning under the name of templates.

    Source  transformers 5.23: `apply_chat_template` and `_alias_reasoning_fields`.
    """
    plain = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        for name in REASONING:
            if name in kept:
                reasoning = kept[name]
                # A `thinking` of its own stays; `reasoning_content` is the name that wins.
                kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
                break
        plain.append(kept)
    return plain


def tagged(messages: Sequence[Message], tag: str) -> tuple[list[Message], str]:
    """Messages with `tag` at the end of the last text, and that text without it.

    Raises  ConfigError if the last message has no text.
    """
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        said = content
        last["content"] = said + tag
    elif content:
        # Of parts the last one goes on.
        *earlier, part = content
        said = part["text"]
        last["content"] = [*earlier, part | {"text": said + tag}]
    else:
        raise ConfigError("there is no message with text to continue")
    return [*messages[:-1], last], said
