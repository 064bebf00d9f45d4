"""A chat request as the text that the model continues."""

from collections.abc import Mapping

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate
from castalia.serve.requests import ChatRequest


def chat_prompt(template: ChatTemplate, body: ChatRequest, defaults: Mapping[str, str]) -> str:
    """The text of a conversation; `defaults` are special tokens for a folder that names none.

    Raises  ConfigError if the template rejects the conversation, or does not read what the request
            gives it.
    """
    # OpenAI: with "none", the model calls no function, so it is told of none.
    tools = body.tools or None
    if body.tool_choice == "none":
        tools = None
    variables = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    # A template without reasoning makes no effort anyway.
    if effort == "none" and not template.reads("reasoning_effort"):
        effort = None
    if effort is not None:
        variables["reasoning_effort"] = effort
    documents = body.documents or None
    given = {"tools": tools, "documents": documents, "reasoning_effort": effort}
    for name, value in given.items():
        if value is not None and not template.reads(name):
            raise ConfigError(
                f"{name}: the model's chat template does not read {name}; leave it out"
            )
    continues = bool(body.continue_final_message)
    reply = body.add_generation_prompt
    if reply is None:
        reply = not continues
    return template.render(
        [message.model_dump(exclude_unset=True) for message in body.messages],
        tools=tools,
        documents=documents,
        reply=reply,
        continue_last=continues,
        variables=variables,
        defaults=defaults,
    )
