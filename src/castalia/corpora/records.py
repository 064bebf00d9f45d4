"""Records of fine-tuning files, and what each kind of them says: the seam of `data.chat` and its
siblings.

A kind reads a record as one conversation for each of its parts. A new kind is one function:

    @text_kind("chat", fields={("messages", TOKENS): "train"}, columns=("messages",))
    def read_chat(record): ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from castalia.core.errors import ConfigError
from castalia.core.registry import Registry
from castalia.corpora.record_labels import label_of, margin_of
from castalia.corpus.chat_messages import ROLES, messages_of, objects_of, weight_of
from castalia.corpus.chat_template import ChatTemplate
from castalia.corpus.chats import ChatFields, ChatForm, Given, RenderedChat, rendered_chat
from castalia.corpus.documents import BadDocumentError, json_type
from castalia.corpus.forms import LABELS, REWARDS, TOKENS, WEIGHTS
from castalia.corpus.message_content import Message
from castalia.tokenizers.tokenizer import Tokenizer

MESSAGES = ("messages", "conversations")
"""Keys of a whole conversation: OpenAI's and TRL's, and ShareGPT's."""
COMPLETIONS = ("completion", "response")
"""Keys of the answer to `prompt`."""
ANSWERS = ("chosen", "rejected")
"""Keys of the two answers of a pair."""
TEMPLATES = {
    "plain": (
        "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ message['role'] + ':\\n' + message['content'] | trim }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{{ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
"""Chat templates for models whose tokenizer has none: `plain` needs no token of its own beside the
end of a text, `chatml` is that of many models, whose tokenizers have its marks. An answer begins on
a line of its own: after a space, its first word would be another token than in a text."""
DTYPES = {TOKENS: "<i4", LABELS: "<i4", WEIGHTS: "<f4", REWARDS: "<f4"}


@dataclass(frozen=True)
class Conversation:
    """One text of a record: what is given, and what the model is to write.

    Both are messages, which the chat template renders, or plain strings, which are joined as they
    are. Without an `answer` the text is the prompt, up to the opening of the reply.
    """

    prompt: list[Message] | str
    answer: list[Message] | str | None
    reward: float = 0.0


@dataclass(frozen=True)
class Record:
    """One line of a file, as a kind reads it."""

    values: Mapping[str, Any]
    roles: Sequence[str]
    """Roles whose messages are targets; the first one answers a prompt that is a string."""

    def has(self, *keys: str) -> str | None:
        """The first of the keys whose value is not null."""
        return next((key for key in keys if self.values.get(key) is not None), None)

    def text(self, key: str) -> list[Message] | str:
        """A string, or messages.

        Raises  BadDocumentError if it is neither.
        """
        value = self.values.get(key)
        if isinstance(value, str):
            return value
        return self.messages(key)

    def messages(self, key: str) -> list[Message]:
        """A conversation.

        Raises  BadDocumentError naming the faulty message.
        """
        return messages_of(self.values.get(key), key, None, (*ROLES, *self.roles))

    def answered(self, prompt: str | None, answer: str, reward: float = 0.0) -> Conversation:
        """The conversation under two keys; both are strings, or both are messages.

        Raises  BadDocumentError if they differ, or the answer is empty.
        """
        given: list[Message] | str = ""
        said = self.text(answer)
        if prompt is not None:
            given = self.text(prompt)
        elif not isinstance(said, str):
            given = []
        if isinstance(given, str) != isinstance(said, str):
            # A string beside messages is a message of its own.
            given = given if isinstance(given, list) else user_message(given)
            said = said if isinstance(said, list) else [{"role": self.roles[0], "content": said}]
        if not said or (isinstance(said, str) and not said.strip()):
            raise BadDocumentError(
                f"{answer!r} is empty, so that there is nothing to learn; leave the record out"
            )
        return Conversation(given, said, reward)


def user_message(text: str) -> list[Message]:
    """A text as the message of a user; none of an empty one."""
    return [{"role": "user", "content": text}] if text else []


ReadRecord = Callable[[Record], Sequence[Conversation]]


@dataclass(frozen=True)
class TextKind:
    """A kind of file under `data`."""

    read: ReadRecord
    """One conversation for each part."""
    fields: Mapping[tuple[str, str], str]
    """(part, kind of output) -> the field of the config's data section that names these files."""
    columns: tuple[str, ...]
    """Keys that a record may have; other columns of a table are not read."""
    keeps_records: bool = False
    """Whether the records themselves stay beside the token files, with all of their keys."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the texts of a record."""
        return tuple(dict.fromkeys(part for part, _ in self.fields))


TEXT_KINDS: Registry[TextKind] = Registry("kind of text")
"""Every kind by the field of the config that names its files."""


def text_kind(
    name: str,
    *,
    fields: Mapping[tuple[str, str], str],
    columns: Sequence[str],
    keeps_records: bool = False,
) -> Callable[[ReadRecord], ReadRecord]:
    """Decorator that adds a kind; the function reads a record."""

    def store(read: ReadRecord) -> ReadRecord:
        TEXT_KINDS.register(name)(TextKind(read, fields, tuple(columns), keeps_records))
        return read

    return store


@text_kind(
    "chat",
    fields={
        ("messages", TOKENS): "train",
        ("messages", LABELS): "labels",
        ("messages", WEIGHTS): "label_weights",
    },
    columns=(*MESSAGES, "prompt", *COMPLETIONS, "text"),
)
def read_chat(record: Record) -> list[Conversation]:
    """A conversation, a prompt with its completion, or a plain text that is learned whole.

    Raises  BadDocumentError if it is none of them, or has nothing to learn.
    """
    whole = record.has(*MESSAGES)
    if whole is not None:
        messages = record.messages(whole)
        require_answer(whole, messages, record.roles)
        return [Conversation([], messages)]
    completion = record.has(*COMPLETIONS)
    if completion is not None:
        return [record.answered(record.has("prompt"), completion)]
    if record.has("text") is not None:
        return [record.answered(None, "text")]
    existing = ", ".join(sorted(record.values)) or "none"
    raise BadDocumentError(
        f"a chat has the key 'messages', or 'prompt' and 'completion', or 'text'; keys: {existing}"
    )


@text_kind(
    "pairs",
    fields={
        ("chosen", TOKENS): "chosen",
        ("chosen", LABELS): "chosen_labels",
        ("rejected", TOKENS): "rejected",
        ("rejected", LABELS): "rejected_labels",
        ("chosen", REWARDS): "rewards",
    },
    columns=("prompt", *ANSWERS, "margin"),
)
def read_pairs(record: Record) -> list[Conversation]:
    """A preferred and a rejected answer to a prompt, which both may begin with instead.

    Raises  BadDocumentError if an answer is missing or empty, or both are the same.
    """
    missing = [key for key in ANSWERS if record.has(key) is None]
    if missing:
        existing = ", ".join(sorted(record.values)) or "none"
        raise BadDocumentError(f"a pair lacks the key {missing[0]!r}; keys: {existing}")
    chosen, rejected = (record.text(key) for key in ANSWERS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadDocumentError(
            "one of 'chosen' and 'rejected' is a string and the other one messages; give both in"
            " one form"
        )
    if chosen == rejected:
        raise BadDocumentError(
            "'chosen' and 'rejected' are the same, so that there is nothing to prefer; leave the"
            " record out"
        )
    shared = 0
    if record.has("prompt") is None:
        shared = shared_length(chosen, rejected)
    elif not isinstance(chosen, str) and not isinstance(rejected, str):
        # Some files name the prompt and begin both conversations with it as well.
        given = record.text("prompt")
        prompt = user_message(given) if isinstance(given, str) else given
        if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
            shared = len(prompt)
    if not shared:
        conversations = [record.answered(record.has("prompt"), key) for key in ANSWERS]
    else:
        conversations = [Conversation(text[:shared], text[shared:]) for text in (chosen, rejected)]
    for key, conversation in zip(ANSWERS, conversations, strict=True):
        require_words(key, conversation.answer, record.roles)
    chosen_one, rejected_one = conversations
    return [replace(chosen_one, reward=margin_of(record.values)), rejected_one]


def shared_length(chosen: list[Message] | str, rejected: list[Message] | str) -> int:
    """How much both begin with: messages, or characters up to the last space that they share."""
    pairs = zip(chosen, rejected, strict=False)
    equal = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    length = min(len(chosen), len(rejected)) if equal is None else equal
    if isinstance(chosen, str):
        # Two answers may begin with the same letters. A space belongs to the word after it, as
        # tokenizers have it.
        length = max((place for place in range(length) if chosen[place].isspace()), default=0)
    return length


def require_words(key: str, answer: list[Message] | str | None, roles: Sequence[str]) -> None:
    """Require an answer that says something.

    Raises  BadDocumentError.
    """
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise BadDocumentError(
            f"{key!r} is empty, or all of it stands in the other answer, too; leave the record out"
        )
    if not isinstance(answer, str):
        require_answer(key, answer, roles)


@text_kind(
    "labelled",
    fields={
        ("answer", TOKENS): "train",
        ("answer", LABELS): "labels",
        ("answer", REWARDS): "rewards",
    },
    columns=("prompt", *COMPLETIONS, "label"),
)
def read_labelled(record: Record) -> list[Conversation]:
    """An answer to a prompt, and whether it is a desirable one.

    Raises  BadDocumentError if the answer is missing or empty, or the label neither true nor false.
    """
    answer = record.has(*COMPLETIONS)
    if answer is None:
        existing = ", ".join(sorted(record.values)) or "none"
        raise BadDocumentError(f"a labelled answer lacks the key 'completion'; keys: {existing}")
    conversation = record.answered(record.has("prompt"), answer, label_of(record.values))
    require_words(answer, conversation.answer, record.roles)
    return [conversation]


@text_kind(
    "prompts",
    fields={("prompt", TOKENS): "train"},
    columns=("prompt",),
    keeps_records=True,
)
def read_prompt(record: Record) -> list[Conversation]:
    """A prompt that the model answers itself; its further keys are for the rewards.

    Raises  BadDocumentError if there is none.
    """
    if record.has("prompt") is None:
        existing = ", ".join(sorted(record.values)) or "none"
        raise BadDocumentError(f"a prompt has the key 'prompt'; keys: {existing}")
    return [Conversation(record.text("prompt"), None)]


def require_answer(key: str, messages: Sequence[Message], roles: Sequence[str]) -> None:
    """Require a message of a role that is trained, and that each of them says something.

    Raises  BadDocumentError.
    """
    answers = [message for message in messages if message["role"] in roles]
    if not answers:
        found = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise BadDocumentError(
            f"{key!r} has no message of the role {' or '.join(roles)}, so that there is nothing to"
            f" learn; roles: {found}"
        )
    for number, message in enumerate(messages, start=1):
        if message["role"] in roles and is_silent(message):
            raise BadDocumentError(
                f"message {number} of {key!r}: the answer is empty; leave the record out"
            )


def is_silent(message: Message) -> bool:
    """Whether a message neither says anything nor calls a tool."""
    others = {name for name in message if name not in ("role", "content", "weight", "name")}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return not others and not (content or "").strip()


@dataclass(frozen=True, kw_only=True)
class RecordFields(ChatFields):
    """The fields to take of a record of one kind."""

    kind: str
    partial: bool = True
    way_out: ClassVar[str] = "data.chat_only_last=true trains on the last answer alone"

    @property
    def columns(self) -> tuple[str, ...]:
        """None: which keys a record needs depends on the others."""
        return ()

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Every key that the kind reads, and those that the template does."""
        return (*TEXT_KINDS[self.kind].columns, *super().optional_columns)

    def texts(self, values: dict[str, Any]) -> tuple[bytes, ...]:
        """The conversations of a record, rendered, one for each part."""
        if not isinstance(values, dict):
            raise BadDocumentError(f"a record must be a JSON object, got {json_type(values)}")
        read = TEXT_KINDS[self.kind].read
        given = {name: objects_of(values, name) for name in super().optional_columns}
        conversations = read(Record(values, self.options.roles))
        return tuple(self.chat_of(conversation, given) for conversation in conversations)

    def render_by_message(
        self, messages: list[Message], prompt_length: int, given: Given
    ) -> RenderedChat:
        """A conversation with the end of each message, or of the last one and those before it.

        Templates that leave out earlier reasoning render a message otherwise once another follows.
        """
        if not self.options.only_last or len(messages) == 1:
            return super().render_by_message(messages, prompt_length, given)
        is_answer = messages[-1]["role"] in self.options.roles
        texts = [self.render(messages[:-1], given, is_answer), self.render(messages, given)]
        if not texts[1].startswith(texts[0]):
            raise BadDocumentError("the chat template rewrites the messages before the last one")
        weight = weight_of(messages[-1], "the last message", partial=True)
        return rendered_chat(texts, [0.0, weight if is_answer else 0.0])

    def chat_of(self, conversation: Conversation, given: Given) -> RenderedChat:
        """One conversation, rendered."""
        prompt = conversation.prompt
        answer = conversation.answer
        if answer is None:
            text = prompt if isinstance(prompt, str) else self.render(prompt, given, reply=True)
            chat = rendered_chat([text], [0.0])
            chat.is_open = True
        elif isinstance(answer, str):
            assert isinstance(prompt, str), "a record's texts are both strings or both messages"
            before = [prompt] if prompt else []
            chat = rendered_chat([*before, prompt + answer], [*[0.0 for _ in before], 1.0])
        else:
            assert isinstance(prompt, list), "a record's texts are both strings or both messages"
            chat = self.render_by_message(prompt + answer, len(prompt), given)
        chat.reward = conversation.reward
        return chat


class NoTemplate(ChatTemplate):
    """In place of the chat template of a tokenizer that has none: plain strings need none."""

    def __post_init__(self) -> None:
        """It is no Jinja source, so that nothing is compiled."""

    def render(self, *args: Any, **options: Any) -> str:
        """Raises  ConfigError that says how to name a template."""
        raise ConfigError(
            f"{self.where} has no chat template beside it (chat_template.jinja, or in"
            " tokenizer_config.json); name one with data.chat_template: a file, its text, or one of"
            f" {', '.join(TEMPLATES)}"
        )

    def reads(self, name: str) -> bool:
        """False."""
        return False


@dataclass(frozen=True)
class RecordForm(ChatForm):
    """Records of one kind as tokens, labels, weights and rewards, as far as the kind has them."""

    kind: str

    def kinds(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Those outputs that the kind names, with their dtypes."""
        wanted = {kind for _, kind in TEXT_KINDS[self.kind].fields}
        return {kind: np.dtype(dtype) for kind, dtype in DTYPES.items() if kind in wanted}

    def wanted(
        self, keys: Sequence[str], keep: Sequence[str], mend: Callable[[str], str] | None
    ) -> RecordFields:
        """The fields to take of each record."""
        return RecordFields(
            tuple(keys),
            tuple(keep),
            mend,
            template=self.template,
            options=self.options,
            kind=self.kind,
        )

    def ends(self, chat: RenderedChat, *, last_is_target: bool) -> list[tuple[int, int]]:
        """The end of a text, unless it is an open prompt or its template has written the end."""
        end = dict(self.template.tokens).get("eos_token")
        is_written = end is not None and bytes(chat).rstrip().endswith(end.encode())
        if is_written or chat.is_open:
            return []
        return super().ends(chat, last_is_target=last_is_target)
