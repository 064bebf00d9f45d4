"""The text of a conversation, for a process of its own: nothing here imports torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate


@dataclass(frozen=True)
class Conversation:
    """What a chat request gives a template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    effort: str | None
    """`reasoning_effort`."""
    variables: Mapping[str, Any]
    reply: bool
    continues: bool
    defaults: Mapping[str, str]
    """Special tokens for a folder that names none."""

    def text(self, template: ChatTemplate) -> str:
        """The text that the model continues.

        Raises  ConfigError if the template rejects the conversation, or does not read what the
                request gives it.
        """
        variables = dict(self.variables)
        effort = self.effort
        # A template without reasoning makes no effort anyway.
        if effort == "none" and not template.reads("reasoning_effort"):
            effort = None
        if effort is not None:
            variables["reasoning_effort"] = effort
        given = {"tools": self.tools, "documents": self.documents, "reasoning_effort": effort}
        for name, value in given.items():
            if value is not None and not template.reads(name):
                raise ConfigError(
                    f"{name}: the model's chat template does not read {name}; leave it out"
                )
        return template.render(
            self.messages,
            tools=self.tools,
            documents=self.documents,
            reply=self.reply,
            continue_last=self.continues,
            variables=variables,
            defaults=self.defaults,
        )
