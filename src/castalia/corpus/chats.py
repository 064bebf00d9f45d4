"""Conversations as tokens and labels, rendered by a chat template.

A label is -100 where its token is not a training target.
Source  tools/datasets/preprocess_data_with_chat_template.py of GPT-NeoX. These files are equal to
        its byte for byte, with three exceptions: rewards, which it writes as integers; messages
        whose first characters merge with the preceding text into one token, where it loses tokens;
        and calls of functions under a template that writes their arguments with `tojson`, which it
        quotes twice where they are JSON text already.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError
from castalia.corpus.chat_messages import ROLES, mended, messages_of, objects_of, weight_of
from castalia.corpus.chat_template import ChatTemplate
from castalia.corpus.documents import (
    BadDocumentError,
    WantedFields,
    as_utf8,
    json_type,
    value_of,
)
from castalia.corpus.encoding import Encoded, Encoder, split_ids
from castalia.corpus.forms import LABELS, REWARDS, TOKENS, WEIGHTS, TextForm
from castalia.corpus.message_content import Message
from castalia.data.labels import IGNORED
from castalia.tokenizers.tokenizer import Tokenizer

PREFIX_BYTES = 1 << 22
"""Text encoded at a time. A conversation of m messages is encoded m times, up to the end of each,
so the sum of its prefixes can be long."""
LARGEST = float(np.finfo(np.float32).max)
FOR_TEMPLATE = ("tools", "documents")
"""Keys of a line that a chat template may read."""
Ids = NDArray[Any]
Given = dict[str, list[Message] | None]
"""What a line has for the template besides messages."""


@dataclass(frozen=True)
class ChatOptions:
    """Which tokens of a conversation are targets."""

    template: str | None = None
    """A Jinja file; None takes the template of the tokenizer's folder."""
    roles: tuple[str, ...] = ("assistant",)
    """Roles whose messages are targets."""
    only_last: bool = False
    """Only the last message is a target."""
    mask: bool = True
    """False makes every token a target and writes no label file."""
    for_rm: bool = False
    """Two end-of-text tokens end each conversation; the second is the only target, as reward models
    are trained."""
    prompt: str | None = None
    """Key of messages, or of a single user text, that precede each conversation, never targets."""
    reward: str | None = None
    """Key of a number; with `binary`, of anything true or false, written as 1 or -1."""
    binary: bool = False
    date: str | None = None
    """The day, YYYY-MM-DD, that a template which asks for it is told; None is the day on which the
    job began."""

    def problems(self) -> list[str]:
        """Sentences about options that contradict each other."""
        problems = []
        chosen = {
            "--only-last": self.only_last,
            "--no-mask": not self.mask,
            "--for-rm": self.for_rm,
        }
        given = [name for name, is_on in chosen.items() if is_on]
        if len(given) > 1:
            problems.append(f"{' and '.join(given)} each choose the targets; give one of them")
        if self.binary and self.reward is None:
            problems.append("--binary-reward needs --reward-key, the key of the reward")
        if self.date is not None and not is_date(self.date):
            problems.append(f"--chat-date {self.date}: expected a day such as 2026-01-31")
        if not self.roles:
            problems.append(
                "--generation-role: name the role whose messages are targets, such as assistant"
            )
        return problems


def is_date(text: str) -> bool:
    """Whether a text is a day in ISO 8601."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


class RenderedChat(bytes):
    """A conversation as the template renders it, in UTF-8.

    Message k, with what the template writes after it, ends at byte `ends[k]`. Its tokens are
    targets, each counting `weights[k]`, unless that is 0.
    """

    ends: list[int]
    weights: list[float]
    reward: float = 0.0
    is_open: bool = False
    """Whether the text goes on, so that no token ends it."""


@dataclass(frozen=True, kw_only=True)
class ChatFields(WantedFields):
    """The fields to take of a line that holds conversations."""

    template: ChatTemplate
    options: ChatOptions
    partial: bool = False
    """Whether a message may count more or less than 1 as a target."""
    way_out: ClassVar[str] = "--no-mask trains on all tokens"
    """What to do about a template that rewrites earlier messages."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that every line must have."""
        optional = (self.options.prompt, self.options.reward)
        return (*self.keys, *(key for key in optional if key is not None))

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Keys for the template that a line may have, if the template reads them."""
        return tuple(name for name in FOR_TEMPLATE if self.template.reads(name))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """None: conversations are lists."""
        return ()

    @property
    def takes_plain_text(self) -> bool:
        """False: a plain text is not a conversation."""
        return False

    def text(self, values: dict[str, Any], key: str) -> bytes:
        """One conversation, rendered."""
        options = self.options
        roles = (*ROLES, *options.roles)
        prompt: list[Message] = []
        if options.prompt is not None:
            value = value_of(values, options.prompt, "--prompt")
            prompt = messages_of(value, options.prompt, "user", roles)
        # After a prompt, a plain string is the answer to it.
        answer_role = options.roles[0] if prompt else None
        value = value_of(values, key, "--chat")
        messages = prompt + messages_of(value, key, answer_role, roles)
        if self.mend:
            messages = [mended(message, self.mend) for message in messages]
        given = {name: objects_of(values, name) for name in self.optional_columns}
        if options.mask and not options.for_rm:
            chat = self.render_by_message(messages, len(prompt), given)
        else:
            chat = rendered_chat([self.render(messages, given)], [float(not options.mask)])
        if options.reward is not None:
            value = value_of(values, options.reward, "--reward-key")
            chat.reward = reward_of(value, options)
        return chat

    def render_by_message(
        self, messages: list[Message], prompt_length: int, given: Given
    ) -> RenderedChat:
        """A conversation with the end of each message; the first `prompt_length` are no targets.

        Message i ends where the rendering of messages 0 to i ends. The opening of a reply, such as
        `<|assistant|>`, belongs to the message before it: the model does not generate it.
        """
        options = self.options
        last = len(messages) - 1
        texts = [""]
        weights = []
        for i, message in enumerate(messages):
            before_reply = i < last and messages[i + 1]["role"] in options.roles
            texts.append(self.render(messages[: i + 1], given, before_reply))
            if not texts[-1].startswith(texts[-2]):
                raise BadDocumentError(
                    f"the chat template rewrites earlier messages when message {i + 1} follows, so"
                    f" its tokens cannot be told apart; {self.way_out}"
                )
            is_generated = i >= prompt_length and message["role"] in options.roles
            is_wanted = is_generated and (i == last or not options.only_last)
            place = f"message {i - prompt_length + 1}"
            weights.append(weight_of(message, place, partial=self.partial) if is_wanted else 0.0)
        return rendered_chat(texts[1:], weights)

    def render(self, messages: list[Message], given: Given, reply: bool = False) -> str:
        """The text of messages; `reply` adds the opening of the assistant's next message."""
        try:
            return self.template.render(
                messages,
                tools=given.get("tools"),
                documents=given.get("documents"),
                reply=reply,
            )
        except ConfigError as error:
            raise BadDocumentError(str(error)) from None


def rendered_chat(texts: Sequence[str], weights: list[float]) -> RenderedChat:
    """A conversation from its texts up to the end of each message, and the messages' weights.

    Raises  BadDocumentError if the text is empty or holds a lone surrogate.
    """
    if not texts[-1].strip():
        raise BadDocumentError("the chat template renders these messages as an empty text")
    chat = RenderedChat(as_utf8(texts[-1], "the conversation"))
    chat.weights = weights
    lengths = (len(longer[len(shorter) :].encode()) for shorter, longer in pairwise(["", *texts]))
    chat.ends = list(accumulate(lengths))
    return chat


def reward_of(value: Any, options: ChatOptions) -> float:
    """A reward as a number; with `binary` 1 or -1.

    Raises  BadDocumentError if the value is not a finite fp32 number.
    """
    is_number = isinstance(value, bool | int | float)
    is_nan = value != value
    if options.binary and is_number and not is_nan:
        return 1.0 if value else -1.0
    if isinstance(value, bool):
        raise BadDocumentError(
            f"{options.reward!r} must be a number, got {str(value).lower()}; --binary-reward turns"
            " it into 1 or -1"
        )
    if not is_number:
        raise BadDocumentError(f"{options.reward!r} must be a number, got {json_type(value)}")
    if not abs(value) <= LARGEST:  # also NaN
        raise BadDocumentError(f"{options.reward!r} must be a finite 32-bit number, got {value}")
    return float(value)


@dataclass(frozen=True)
class ChatForm(TextForm):
    """Conversations: tokens, labels unless all tokens are targets, and rewards.

    Each conversation ends with `eos_id`, unless that is None.
    """

    template: ChatTemplate
    options: ChatOptions
    eos_id: int | None

    @property
    def always_names_key(self) -> bool:
        """True: GPT-NeoX always writes PREFIX_KEY_document."""
        return True

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for PREFIX.json."""
        template = {
            "template": self.template.where,
            "template_sha256": sha256(self.template.text.encode()).hexdigest(),
        }
        if self.moment is not None:
            template["moment"] = self.moment
        return {"chat": {**asdict(self.options), **template, "eos_id": self.eos_id}}

    @property
    def moment(self) -> str | None:
        """The time that the template is told."""
        return self.template.moment

    def at(self, moment: str) -> "ChatForm":
        """This form at a fixed time, so that a job gives the same text however long it takes."""
        return replace(self, template=replace(self.template, moment=moment))

    def kinds(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """int32 tokens and labels, as GPT-NeoX writes them; float32 rewards."""
        kinds: dict[str, Any] = {TOKENS: np.dtype("<i4")}
        if self.options.mask:
            kinds[LABELS] = np.dtype("<i4")
        if self.options.reward is not None:
            kinds[REWARDS] = np.dtype("<f4")
        return kinds

    def wanted(
        self, keys: Sequence[str], keep: Sequence[str], mend: Callable[[str], str] | None
    ) -> WantedFields:
        """The fields to take of each line."""
        return ChatFields(
            tuple(keys), tuple(keep), mend, template=self.template, options=self.options
        )

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """Tokens, labels and rewards of conversations."""
        chats = cast(Sequence[RenderedChat], texts)
        prefixes = prefix_ids(encoder, chats)
        labelled = [
            self.labelled(encoder, chat, [next(prefixes) for _ in chat.ends]) for chat in chats
        ]
        lengths = np.array([len(tokens) for tokens, *_ in labelled], np.int64)
        if not lengths.all():
            raise DataError(
                "the tokenizer gives no token for a conversation; choose another --tokenizer"
            )
        tokens, labels, weights = (
            np.concatenate([chat[part] for chat in labelled]) for part in range(3)
        )
        rewards = np.array([chat.reward for chat in chats], "<f4")
        by_kind = {
            TOKENS: (tokens, lengths),
            LABELS: (labels, lengths),
            WEIGHTS: (weights, lengths),
            REWARDS: (rewards, np.ones(len(chats), np.int64)),
        }
        return [by_kind[kind] for kind in self.kinds(encoder.tokenizer)]

    def labelled(
        self, encoder: Encoder, chat: RenderedChat, prefixes: list[Ids]
    ) -> tuple[Ids, Ids, Ids]:
        """Tokens, labels and weights, (n,) each, of a conversation.

        `prefixes` are the ids of its text up to the end of each message. The tokens of a message
        are what its prefix adds to the previous one.
        """
        tokens = np.empty(0, np.int32)
        labels = np.empty(0, np.int32)
        weights = np.empty(0, np.float32)
        start = 0
        for prefix, end, weight in zip(prefixes, chat.ends, chat.weights, strict=True):
            if np.array_equal(prefix[: len(tokens)], tokens):
                added = prefix[len(tokens) :]
            else:
                # A token crosses the border between two messages: this one is encoded alone.
                added, _ = encoder([bytes(chat[start:end])])
            added = added.astype(np.int32)
            own_labels = added if weight else np.full(len(added), IGNORED, np.int32)
            tokens = np.append(tokens, added)
            labels = np.append(labels, own_labels)
            weights = np.append(weights, np.full(len(added), weight, np.float32))
            start = end
        last_is_target = bool(len(labels)) and labels[-1] != IGNORED
        for token, label in self.ends(chat, last_is_target=last_is_target):
            tokens = np.append(tokens, np.int32(token))
            labels = np.append(labels, np.int32(label))
            # A conversation's end counts as its last message does.
            weights = np.append(weights, np.float32(chat.weights[-1]))
        return tokens, labels, weights

    def ends(self, chat: RenderedChat, *, last_is_target: bool) -> list[tuple[int, int]]:
        """Tokens that end a conversation, with their labels."""
        eos = self.eos_id
        if eos is None or not self.options.mask:
            return []
        if self.options.for_rm:
            # The model's inputs end one token before its targets, so it reads the first of the two.
            return [(eos, IGNORED), (eos, eos)]
        return [(eos, eos if last_is_target else IGNORED)]


def prefix_ids(encoder: Encoder, chats: Sequence[RenderedChat]) -> Iterator[Ids]:
    """Ids of each conversation's text up to the end of each message, PREFIX_BYTES at a time."""
    prefixes: list[bytes] = []
    size = 0
    for chat in chats:
        for end in chat.ends:
            prefixes.append(bytes(chat[:end]))
            size += end
            if size >= PREFIX_BYTES:
                yield from split_ids(*encoder(prefixes))
                prefixes = []
                size = 0
    if prefixes:
        yield from split_ids(*encoder(prefixes))
