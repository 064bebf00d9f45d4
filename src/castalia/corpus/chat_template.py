"""Conversations to text: the Jinja chat template of a Hugging Face tokenizer, in a sandbox.

Source  transformers' utils/chat_template_utils.py, whose Jinja settings these are.
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

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template."""

    text: str
    """Jinja source."""
    where: str
    """The file it was read from."""
    tokens: tuple[tuple[str, str], ...] = ()
    """Name and text of the special tokens that it may write."""

    def render(self, messages: Messages, *, reply: bool = False, **more: str) -> str:
        """The text of a conversation; `reply` adds the opening of the assistant's next message.

        `more` are special tokens for a tokenizer that names none. `strftime_now` is not defined: a
        template that asks for the date takes its fixed one, so the same conversation gives the same
        text on any day.
        Raises  ConfigError if the template rejects the conversation or is not valid Jinja.
        """
        template = compiled(self.text, self.where)
        try:
            text: str = template.render(
                messages=messages, add_generation_prompt=reply, **(more | dict(self.tokens))
            )
        except Exception as error:  # a template may fail in any way that Python can
            raise ConfigError(f"the chat template rejects this conversation: {error}") from None
        return text


@lru_cache(maxsize=16)
def compiled(text: str, where: str) -> Any:
    """The template, ready to render.

    Raises  ConfigError if it is not valid Jinja, or jinja2 is not installed.
    """
    jinja2 = require("jinja2", "chat", f"the chat template {where}")
    sandbox = require("jinja2.sandbox", "chat", f"the chat template {where}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # Templates come from downloaded folders: the sandbox denies them Python's internals.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", generation_blocks()],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = as_json
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{where}: line {error.lineno}: invalid Jinja template: {error.message}"
        ) from None


def generation_blocks() -> Any:
    """The tag {% generation %}, which marks the assistant's words in some templates.

    Its content is rendered unchanged.
    """
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
    """The filter `tojson`; Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def read_chat_template(
    folder: Path | None, file: str | os.PathLike[str] | None = None
) -> ChatTemplate | None:
    """The template in `file`, else that of a tokenizer's folder; None if it has none.

    Raises  DataError if a file cannot be read.
    """
    settings = read_settings(folder)
    tokens = special_tokens(settings)
    if file is None and folder is not None and (folder / TEMPLATE_FILE).is_file():
        file = folder / TEMPLATE_FILE
    if file is not None:
        try:
            return ChatTemplate(Path(file).read_text(encoding="utf-8"), str(file), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot read the chat template: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates by name
        by_name = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = by_name.get("default")
    if not isinstance(template, str):
        return None
    return ChatTemplate(template, f"{folder}/{SETTINGS}", tokens)


def read_settings(folder: Path | None) -> dict[str, Any]:
    """tokenizer_config.json of a folder; empty if there is none.

    Raises  DataError if it is not a JSON object.
    """
    if folder is None or not (folder / SETTINGS).is_file():
        return {}
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def special_tokens(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Name and text of the special tokens in a tokenizer's settings.

    A token is written as its text, or as an object with its text and flags.
    """
    tokens = []
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens.append((name, text))
    return tuple(tokens)
