"""Arguments of function calls, as chat templates get them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from castalia.corpus.message_content import Message


class CallArguments(dict[str, Any]):
    """Arguments that were given as JSON text: an object for `tojson` and loops, else the text.

    Most templates expect an object, older ones join the text. Each gets what it expects, so the
    text of a conversation depends on the template alone.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        # As it was given: other blanks would be other tokens than the model wrote. Named so that
        # `arguments.text` in a template is the value of the key "text".
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, text: str) -> str:
        return self._text + text

    def __radd__(self, text: str) -> str:
        return text + self._text


def with_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages with the arguments of their `tool_calls` as objects.

    OpenAI's API has them as JSON text, transformers' documentation as objects. vLLM turns the one
    into the other, too. Calls of another form stay as they are: what they mean is the template's
    matter.
    """
    converted = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = message | {"tool_calls": [as_object(call) for call in calls]}
        converted.append(message)
    return converted


def as_object(call: Any) -> Any:
    """A call whose arguments are an object, unless they are not the JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    text = function.get("arguments")
    if not isinstance(text, str):
        return call
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(values, dict):
        return call
    return call | {"function": function | {"arguments": CallArguments(values, text)}}
