"""A chat request as the text that the model continues."""

from collections.abc import Mapping

from castalia.corpus.chat_template import ChatTemplate
from castalia.serve.requests import ChatRequest
from castalia.serve.template_text import Conversation


def conversation_of(body: ChatRequest, defaults: Mapping[str, str]) -> Conversation:
    """What the request gives the template; `defaults` are special tokens for a folder that names
    none."""
    # OpenAI: with "none", the model calls no function, so it is told of none.
    tools = body.tools or None
    if body.tool_choice == "none":
        tools = None
    continues = bool(body.continue_final_message)
    reply = body.add_generation_prompt
    if reply is None:
        reply = not continues
    return Conversation(
        messages=[message.model_dump(exclude_unset=True) for message in body.messages],
        tools=tools,
        documents=body.documents or None,
        effort=body.reasoning_effort,
        variables=body.chat_template_kwargs or {},
        reply=reply,
        continues=continues,
        defaults=defaults,
    )


def chat_prompt(template: ChatTemplate, body: ChatRequest, defaults: Mapping[str, str]) -> str:
    """The text of a conversation, written in this process.

    Raises  ConfigError if the template rejects the conversation, or does not read what the request
            gives it.
    """
    return conversation_of(body, defaults).text(template)
