"""Conversations to text: the Jinja chat template of a Hugging Face tokenizer, in a sandbox.

Source  transformers 5.23, utils/chat_template_utils.py and `apply_chat_template`: a template is
        given what transformers gives it, except the arguments of calls (see call_arguments.py).
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError
from castalia.core.extras import require
from castalia.corpus.call_arguments import with_arguments
from castalia.corpus.message_content import (
    EITHER,
    PARTS,
    STRING,
    in_form,
    tagged,
    without_nulls,
)
from castalia.corpus.template_sandbox import clock, compiled, names_read
from castalia.tokenizers.settings import DEFAULT, chat_templates, read_text, special_tokens

CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the message that is to be continued, as transformers does. The space shows
whether the template trims the message."""
PROBE = "the words of the probe"
Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Raises  ConfigError if it is not valid Jinja, or jinja2 is not installed.
    """

    text: str
    """Jinja source."""
    where: str
    """The file it was read from."""
    tokens: tuple[tuple[str, str], ...] = ()
    """Name and text of the special tokens that it may write."""
    tool_use: str | None = None
    """Jinja source for conversations with tools, if the tokenizer has one of its own."""
    moment: str | None = None
    """What `strftime_now` tells, in ISO 8601; None tells the clock's time."""

    def __post_init__(self) -> None:
        compiled(self.text, self.where)
        if self.tool_use is not None:
            compiled(self.tool_use, self.where)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        reply: bool = False,
        continue_last: bool = False,
        variables: Mapping[str, Any] | None = None,
        defaults: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation.

        `messages` have a role, and a content that is a string, null, or a list of text parts; all
        their keys reach the template, but for those that are null. Parts become one string, with
        line breaks between them, for a template that expects strings. The arguments of tool calls
        become objects if they are JSON text, see `CallArguments`.

        tools          JSON schemas of the functions that the model may call.
        documents      objects with `title` and `text`, for templates of retrieval.
        reply          add the opening of the assistant's next message.
        continue_last  leave the last message open, so that the model continues it.
        variables      more names for the template (vLLM's chat_template_kwargs); they win over
                       special tokens.
        defaults       special tokens for a tokenizer whose folder names none.

        Raises  ConfigError if the template rejects the conversation, a part of a content is not
                text, or there is nothing to continue.
        """
        if reply and continue_last:
            raise ConfigError(
                "a text either opens a new message or continues the last one; give one of"
                " add_generation_prompt and continue_final_message"
            )
        # Here, so that a model is trained on the text that it is served with.
        plain = in_form(with_arguments(without_nulls(messages)), self.content_form)
        said = ""
        if continue_last:
            plain, said = tagged(plain, CONTINUED)
        names = {
            **(dict(self.tokens) or defaults or {}),
            **(variables or {}),
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": reply,
        }
        text = self.rendered(plain, names)
        if continue_last:
            return up_to_tag(text, said)
        return text

    def rendered(self, messages: Sequence[Message], names: Mapping[str, Any]) -> str:
        """The text of messages in the form that the template expects.

        Raises  ConfigError if the template rejects them.
        """
        jinja2 = require("jinja2", "chat", f"the chat template {self.where}")
        source = self.text
        if self.tool_use is not None and names["tools"] is not None:
            source = self.tool_use
        template = compiled(source, self.where)
        if self.moment is not None:
            names = {"strftime_now": clock(self.moment), **names}
        # A template that joins strings cannot take a message without a content: "" is the second
        # try, since others ask whether there is a content.
        attempts = [messages]
        if not all("content" in message for message in messages):
            attempts.append([{"content": "", **message} for message in messages])
        try:
            for attempt in attempts[:-1]:
                with suppress(jinja2.UndefinedError):
                    return str(template.render(messages=attempt, **names))
            return str(template.render(messages=attempts[-1], **names))
        except Exception as error:  # a template may fail in any way that Python can
            # Some errors of Python, such as that memory is exhausted, say nothing but their name.
            reason = str(error) or type(error).__name__
            raise ConfigError(f"the chat template rejects this conversation: {reason}") from None

    def reads(self, name: str) -> bool:
        """Whether the template reads a variable, such as `tools`."""
        return any(
            source is not None and name in names_read(source, self.where)
            for source in (self.text, self.tool_use)
        )

    @property
    def content_form(self) -> str:
        """STRING, PARTS or EITHER: the contents that the template expects."""
        return content_form(self.text, self.where, self.tokens)


@lru_cache(maxsize=16)
def content_form(text: str, where: str, tokens: tuple[tuple[str, str], ...]) -> str:
    """The contents that a template expects: it is asked to write a string, and a list of parts."""
    writes = []
    for content in (PROBE, [{"type": "text", "text": PROBE}]):
        names = {**dict(tokens), "tools": None, "documents": None}
        message = {"role": "user", "content": content}
        try:
            written = compiled(text, where).render(messages=[message], **names)
        except Exception:  # it refuses this form
            written = ""
        # Python's own spelling of the list would be no text of a conversation.
        writes.append(PROBE in written and "'type'" not in written and '"type"' not in written)
    if writes == [True, True]:
        return EITHER
    return PARTS if writes == [False, True] else STRING


def up_to_tag(text: str, said: str) -> str:
    """A rendered conversation up to the end of its last message, which says `said` and CONTINUED.

    Raises  ConfigError if the template left a part of the message out.
    """
    place = text.rfind(CONTINUED.strip())
    if place < 0 or said.strip() not in text:
        raise ConfigError(
            "the last message cannot be continued: the chat template leaves a part of it out"
        )
    if text.startswith(CONTINUED, place):
        return text[:place]
    # The template trims the message.
    return text[:place].rstrip()


def read_chat_template(
    folder: Path | None, file: str | os.PathLike[str] | None = None
) -> ChatTemplate | None:
    """The template in `file`, else that of a tokenizer's folder; None if it has none.

    Raises  DataError if a file cannot be read; ConfigError if the template is not valid Jinja.
    """
    tokens = tuple(special_tokens(folder).items())
    if file is not None:
        return ChatTemplate(read_text(Path(file)), str(file), tokens)
    templates, where = chat_templates(folder)
    if DEFAULT not in templates:
        return None
    return ChatTemplate(templates[DEFAULT], where, tokens, templates.get("tool_use"))
