"""Conversations to text: the Jinja chat template of a Hugging Face tokenizer, rendered in a sandbox.

Source  transformers' utils/chat_template_utils.py, whose settings of Jinja these are.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError, DataError
from castalia.core.extras import require

LONE_FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: `text` in Jinja, `where` it was read, and the special tokens that it may write, by name."""

    text: str
    where: str
    tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Messages, *, reply: bool = False, **more: str) -> str:
        """The text of a conversation; with `reply`, also the opening of the assistant's next message.

        `more` are special tokens where the tokenizer names none. There is no `strftime_now`: a template that asks
        for the date takes its fixed one, and the same conversation is the same text on any day.
        Raises  ConfigError if the template refuses the conversation or is no Jinja.
        """
        inner = compiled(self.text, self.where)
        try:
            text: str = inner.render(
                messages=messages, add_generation_prompt=reply, **(more | dict(self.tokens))
            )
        except Exception as error:  # a template may fail in any way that Python can
            raise ConfigError(f"the chat template refuses this conversation: {error}") from None
        return text


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> Any:
    """The template, ready to render.

    Raises  ConfigError if it is no Jinja, or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "chat", f"the chat template {where}")
    sandbox = require("jinja2.sandbox", "chat", f"the chat template {where}")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", generation_blocks()],
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = as_json
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}: not a Jinja template: {error.message}"
        ) from None


def generation_blocks() -> Any:
    """The tag {% generation %}, which marks the assistant's words in some templates: its content stands as it is."""
    extensions: Any = require("jinja2.ext", "chat", "a chat template")

    class Generation(extensions.Extension):
        """{% generation %} ... {% endgeneration %}."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The nodes between the tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` without the escapes of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def read_chat_template(
    folder: Path | None, file: str | os.PathLike[str] | None = None
) -> ChatTemplate | None:
    """The template in `file`, else that of a tokenizer's folder, if it has one; None if there is none.

    Raises  DataError if a file cannot be read.
    """
    config = read_settings(folder)
    tokens = tuple(
        (name, text)
        for name, value in config.items()
        if (text := special_token(name, value)) is not None
    )
    if file is None and folder is not None and (folder / LONE_FILE).is_file():
        file = folder / LONE_FILE
    if file is not None:
        try:
            return ChatTemplate(Path(file).read_text(encoding="utf-8"), str(file), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: the chat template cannot be read: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {
            one.get("name"): one.get("template") for one in found if isinstance(one, dict)
        }.get("default")
    return ChatTemplate(found, f"{folder}/{SETTINGS}", tokens) if isinstance(found, str) else None


def read_settings(folder: Path | None) -> dict[str, Any]:
    """tokenizer_config.json of a folder; empty if there is none.

    Raises  DataError if it is no JSON object.
    """
    if folder is None or not (path := folder / SETTINGS).is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def special_token(name: str, value: Any) -> str | None:
    """The text of a special token as the settings write it, as it is or with its flags; None if this is none."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if name.endswith("_token") and isinstance(value, str) else None
