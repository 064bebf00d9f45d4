"""Conversations with a model: the chat template beside its tokenizer writes the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.tokenizers.tokenizer import Tokenizer


class Speaker(Protocol):
    """A model that is asked, such as a LanguageModel: its tokenizer and special tokens."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that reads and writes ids alone."""

    @property
    def eod_id(self) -> int | None:
        """The first id that ends a text."""

    @property
    def start_id(self) -> int | None:
        """The id before a text."""

    def token_name(self, token: int | None) -> str | None:
        """The text of a token."""


def template_of(model: Speaker) -> ChatTemplate | None:
    """The chat template beside the model's tokenizer; None without one.

    Raises  ConfigError if it is not valid Jinja.
    """
    file = None if model.tokenizer is None else Path(model.tokenizer.where)
    if file is None or not file.is_file():
        return None
    return read_chat_template(file.parent)


def special_defaults(model: Speaker) -> dict[str, str]:
    """Special tokens for a template, where the tokenizer's folder names none."""
    return {
        "eos_token": model.token_name(model.eod_id) or "",
        "bos_token": model.token_name(model.start_id) or "",
    }


class Chat:
    """A conversation: `prompt(text)` asks, and `hear(answer)` keeps what was answered.

    system  the first message, of the role `system`; None for none.
    Raises  ConfigError if the model has no chat template.
    """

    def __init__(self, model: Speaker, system: str | None = None) -> None:
        template = template_of(model)
        if template is None:
            raise ConfigError(
                "the model has no chat template beside its tokenizer (it is a base model); leave"
                " --chat out, or fine-tune it: castalia train sft model.start=MODEL data.chat=FILE"
            )
        self.template = template
        self.defaults: Mapping[str, str] = special_defaults(model)
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, by {self.template.where})"

    def clear(self) -> None:
        """Begin again, with the first message alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def prompt(self, text: str) -> str:
        """The text that the model continues after the user has said `text`.

        Raises  ConfigError if the template rejects the conversation.
        """
        self.messages.append({"role": "user", "content": text})
        return self.template.render(self.messages, reply=True, defaults=self.defaults)

    def hear(self, answer: str) -> None:
        """Keep the model's answer for the messages that follow."""
        self.messages.append({"role": "assistant", "content": answer})

    def forget(self) -> None:
        """Take back the last message, which could not be answered."""
        self.messages.pop()

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """The prompt of each text, as the first of a conversation of its own."""
        made = []
        for text in texts:
            self.clear()
            made.append(self.prompt(text))
        self.clear()
        return made
