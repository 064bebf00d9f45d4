"""The messages of a conversation in a line of a corpus: OpenAI's form and ShareGPT's."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from castalia.core.errors import ConfigError, nearest
from castalia.corpus.documents import BadDocumentError, json_type
from castalia.corpus.message_content import Message, texts_of_parts

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""Roles in ShareGPT files, and OpenAI's names for them."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
TRAIN_FLAGS = ("train", "training", "loss")
"""Keys of messages that are false where the message is no target: of axolotl and ms-swift."""


def messages_of(value: Any, key: str, lone_role: str | None, roles: Sequence[str]) -> list[Message]:
    """Messages with role and content, from OpenAI's form or ShareGPT's.

    With a `lone_role` a string is one message of that role.
    Raises  BadDocumentError naming the faulty message.
    """
    if isinstance(value, str) and lone_role is not None:
        return [{"role": lone_role, "content": value}]
    if not isinstance(value, list):
        raise BadDocumentError(f"{key!r} must be a list of messages, got {json_type(value)}")
    if not value:
        raise BadDocumentError(f"{key!r} is an empty list of messages")
    return [
        message_of(entry, f"message {i} of {key!r}", roles)
        for i, entry in enumerate(value, start=1)
    ]


def message_of(value: Any, where: str, roles: Sequence[str]) -> Message:
    """One message.

    Raises  BadDocumentError with its fault.
    """
    if not isinstance(value, dict):
        raise BadDocumentError(
            f"{where} must be an object with role and content, got {type(value).__name__}"
        )
    # A message with both has OpenAI's form: there `from` is one more key for the template.
    is_sharegpt = "from" in value and "role" not in value
    role_key = "role"
    content_key = "content"
    if is_sharegpt:
        role_key = "from"
        content_key = "value"
    required = [role_key, content_key]
    # OpenAI's messages that call tools may lack a content, or have a null one.
    if calls_tools(value):
        required.remove(content_key)
    for name in required:
        if name not in value:
            existing = ", ".join(map(str, value)) or "none"
            raise BadDocumentError(f"{where} lacks the key {name!r}; keys: {existing}")
    role = value[role_key]
    if not isinstance(role, str):
        raise BadDocumentError(f"{where}: {role_key!r} must be a string, got {json_type(role)}")
    if is_sharegpt:
        role = SHAREGPT_ROLES.get(role, role)
    if role not in roles:
        raise BadDocumentError(
            f"{where}: unknown role {role!r}; choose one of {', '.join(dict.fromkeys(roles))}"
            f"{nearest(role, roles)}"
        )
    others = {name: other for name, other in value.items() if name not in (role_key, content_key)}
    content = content_of(value.get(content_key), f"{where}: {content_key!r}")
    return {"role": role, "content": content, **others}


def calls_tools(message: Message) -> bool:
    """Whether a message calls tools, in OpenAI's present form or the older one."""
    return bool(message.get("tool_calls") or message.get("function_call"))


def content_of(content: Any, where: str) -> str | list[Message] | None:
    """A content as the template takes it: a string, null, or parts of text.

    Raises  BadDocumentError about another type, or a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadDocumentError(
            f"{where} must be a string, null or a list of parts, got {json_type(content)}"
        )
    try:
        return [{"type": "text", "text": text} for text in texts_of_parts(content)]
    except ConfigError as error:
        raise BadDocumentError(f"{where}: {error}") from None


def mended(message: Message, mend: Callable[[str], str]) -> Message:
    """A message with its content mended; an empty one, of a tool call, stays."""
    content = message["content"]
    if isinstance(content, str) and content:
        return message | {"content": mend(content)}
    if isinstance(content, list):
        parts = [part | {"text": mend(part["text"])} for part in content]
        return message | {"content": parts}
    return message


def weight_of(message: Message, where: str, *, partial: bool = False) -> float:
    """How much a message itself says that it counts as a target; 1 where it says nothing.

    By `weight`, 0 or 1 as in OpenAI's files, with `partial` any number >= 0; or by `train`,
    `training` or `loss: false`, as in those of other trainers, for 0.
    Raises  BadDocumentError about a value that cannot be followed.
    """
    weight = message.get("weight")
    if weight is None:
        weight = 1.0
    is_number = isinstance(weight, int | float)
    # 0.0 and false equal 0, and true equals 1.
    if partial and not (is_number and 0 <= weight < float("inf")):
        raise BadDocumentError(f"{where}: 'weight' must be a finite number >= 0, got {weight!r}")
    if not partial and weight not in (0, 1):
        raise BadDocumentError(
            f"{where}: 'weight' must be 0 or 1, got {weight!r}; no message is a target in part"
        )
    flags = [message.get(name) for name in TRAIN_FLAGS]
    for name, flag in zip(TRAIN_FLAGS, flags, strict=True):
        if flag is not None and not isinstance(flag, bool):
            raise BadDocumentError(f"{where}: {name!r} must be true or false, got {flag!r}")
    if message.get("train_detail") is not None:
        raise BadDocumentError(
            f"{where}: 'train_detail' is not supported; a message is a target as a whole or not"
        )
    return 0.0 if False in flags else float(weight)


def objects_of(values: Message, name: str) -> list[Message] | None:
    """The list of objects under an optional key of a line, such as `tools`; None without one.

    It may be written as JSON in a string, as columns of tables hold it.
    Raises  BadDocumentError if it is something else.
    """
    value = values.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadDocumentError(f"{name!r} must be a list of objects, got a string") from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadDocumentError(f"{name!r} must be a list of objects, got {json_type(value)}")
    return value
