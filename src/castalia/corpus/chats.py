"""Conversations as tokens and labels: rendered by a chat template, with -100 where a token is no target.

Source  tools/datasets/preprocess_data_with_chat_template.py of GPT-NeoX, whose files these are byte for byte, but for
        rewards, which it writes as whole numbers, and for messages whose first characters join the text before them
        in one token, of which it loses some.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.corpus.chat_template import ChatTemplate
from castalia.corpus.documents import Wanted, WrongError, as_utf8, value_of
from castalia.corpus.encoding import Encoded, Encoder, pieces_of
from castalia.corpus.forms import LABELS, REWARDS, TOKENS, Texts
from castalia.data.labels import IGNORED
from castalia.data.tokenizer import Tokenizer

SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
"""Roles that ShareGPT files call otherwise."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
PREFIX_BYTES = 1 << 22
"""Text that is encoded at a time: of a conversation of many messages the sum of its beginnings is long."""
LARGEST = float(np.finfo(np.float32).max)
Message = dict[str, Any]
Ints = NDArray[Any]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become targets.

    `roles` are those whose messages are targets; `only_last` leaves the last message alone of them. `mask` False makes
    every token a target, without a label file. `for_rm` ends each conversation with two end-of-text tokens, of which
    the second is the one target, as a reward model wants it. `prompt` is the key of messages, or of the user's one
    text, that stand before each conversation and are no target. `reward` is the key of a number, or with `binary` of
    good or bad, 1 or -1. `template` is a file; None takes the tokenizer's own.
    """

    template: str | None = None
    roles: tuple[str, ...] = ("assistant",)
    only_last: bool = False
    mask: bool = True
    for_rm: bool = False
    prompt: str | None = None
    reward: str | None = None
    binary: bool = False

    def problems(self) -> list[str]:
        """What is wrong with them."""
        wrong = []
        chosen = {
            "--only-last": self.only_last,
            "--no-mask": not self.mask,
            "--for-rm": self.for_rm,
        }
        if len(given := [name for name, on in chosen.items() if on]) > 1:
            wrong.append(
                f"{' and '.join(given)} each say which tokens are targets; give one of them"
            )
        if self.binary and self.reward is None:
            wrong.append(
                "--binary-reward says how to read the reward: name its key with --reward-key"
            )
        if not self.roles:
            wrong.append(
                "--generation-role: name the role whose messages are targets, such as assistant"
            )
        return wrong


class Chat(bytes):
    """A conversation as the template writes it, in UTF-8: message k and what the template writes after it end at byte
    `ends[k]` and are targets if `targets[k]`."""

    ends: list[int]
    targets: list[bool]
    reward: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WantedChats(Wanted):
    """What to take of a line that holds conversations."""

    template: ChatTemplate
    options: ChatOptions

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that must be there."""
        return (
            *self.keys,
            *(key for key in (self.options.prompt, self.options.reward) if key is not None),
        )

    @property
    def strings(self) -> tuple[str, ...]:
        """None of them holds plain text."""
        return ()

    @property
    def takes_plain_text(self) -> bool:
        """A plain text is no conversation."""
        return False

    def text(self, values: dict[str, Any], key: str) -> bytes:
        """One conversation, rendered."""
        options, roles = self.options, (*ROLES, *self.options.roles)
        before: list[Message] = []
        if options.prompt is not None:
            before = messages_of(
                value_of(values, options.prompt, "--prompt"), options.prompt, "user", roles
            )
        answer = options.roles[0] if before else None
        messages = before + messages_of(value_of(values, key, "--chat"), key, answer, roles)
        if self.mend:
            messages = [
                m | {"content": self.mend(m["content"])} if m["content"] else m for m in messages
            ]
        by_turn = options.mask and not options.for_rm
        made = (
            self.by_turn(messages, len(before))
            if by_turn
            else chat([self.render(messages)], [not options.mask])
        )
        if options.reward is not None:
            made.reward = reward_of(value_of(values, options.reward, "--reward-key"), options)
        return made

    def by_turn(self, messages: list[Message], before: int) -> Chat:
        """A conversation, its messages told apart, of which the first `before` are no targets; what opens an answer
        belongs to the message before it."""
        options, last = self.options, len(messages) - 1
        texts, targets = [""], []
        for i, message in enumerate(messages):
            reply = i < last and messages[i + 1]["role"] in options.roles
            texts.append(self.render(messages[: i + 1], reply))
            if not texts[-1].startswith(texts[-2]):
                raise WrongError(
                    f"the chat template writes the first {i} messages otherwise when message {i + 1} follows, so that"
                    " its tokens cannot be told apart; --no-mask trains on all of them"
                )
            own = i >= before and message["role"] in options.roles
            targets.append(own and (i == last or not options.only_last))
        return chat(texts[1:], targets)

    def render(self, messages: list[Message], reply: bool = False) -> str:
        """The text of messages."""
        try:
            return self.template.render(messages, reply=reply)
        except ConfigError as error:
            raise WrongError(str(error)) from None


def chat(texts: Sequence[str], targets: list[bool]) -> Chat:
    """A conversation out of its texts up to the end of each message.

    Raises  WrongError if there is none, or half a character.
    """
    if not texts[-1].strip():
        raise WrongError("the chat template writes nothing for these messages")
    made = Chat(as_utf8(texts[-1], "the conversation"))
    made.targets = targets
    made.ends = list(
        accumulate(
            len(longer[len(shorter) :].encode()) for shorter, longer in pairwise(["", *texts])
        )
    )
    return made


def messages_of(value: Any, key: str, alone: str | None, roles: Sequence[str]) -> list[Message]:
    """Messages as role and content, of OpenAI's form or ShareGPT's; a text is one message of the role `alone`.

    Raises  WrongError saying which message is wrong.
    """
    if isinstance(value, str) and alone is not None:
        return [{"role": alone, "content": value}]
    if not isinstance(value, list):
        raise WrongError(
            f"{key!r} must be a list of messages, got {'null' if value is None else type(value).__name__}"
        )
    if not value:
        raise WrongError(f"{key!r} holds no message")
    return [
        message_of(one, f"message {i} of {key!r}", roles) for i, one in enumerate(value, start=1)
    ]


def message_of(value: Any, where: str, roles: Sequence[str]) -> Message:
    """One message.

    Raises  WrongError saying what is wrong with it.
    """
    if not isinstance(value, dict):
        raise WrongError(
            f"{where} must be an object with role and content, got {type(value).__name__}"
        )
    role_key, content_key = (
        ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    )
    for name in (role_key, content_key):
        if name not in value:
            raise WrongError(
                f"{where} has no {name!r}; have: {', '.join(map(str, value)) or 'nothing'}"
            )
    role, content = value[role_key], value[content_key]
    if not isinstance(role, str):
        raise WrongError(f"{where}: {role_key!r} must be a string, got {type(role).__name__}")
    role = SHAREGPT.get(role, role) if role_key == "from" else role
    if role not in roles:
        raise WrongError(
            f"{where}: no role {role!r}; have: {', '.join(dict.fromkeys(roles))}{nearest(role, roles)}"
        )
    if not isinstance(content, str) and not (content is None and value.get("tool_calls")):
        kind = "null" if content is None else type(content).__name__
        raise WrongError(f"{where}: {content_key!r} must be a string, got {kind}")
    rest = {name: held for name, held in value.items() if name not in (role_key, content_key)}
    return {"role": role, "content": content, **rest}


def reward_of(value: Any, options: ChatOptions) -> float:
    """A reward as a number; 1 or -1 for what is good or bad.

    Raises  WrongError if it is none.
    """
    if (
        options.binary and isinstance(value, bool | int | float) and value == value
    ):  # NaN is not itself
        return 1.0 if value else -1.0
    if isinstance(value, bool):
        raise WrongError(
            f"{options.reward!r} is {str(value).lower()}, not a number; --binary-reward makes it 1 or -1"
        )
    if not isinstance(value, int | float):
        kind = "null" if value is None else type(value).__name__
        raise WrongError(f"{options.reward!r} must be a number, got {kind}")
    if not abs(value) <= LARGEST:
        raise WrongError(f"{options.reward!r} is {value}, which is no finite number of 32 bits")
    return float(value)


@dataclass(frozen=True)
class Chats(Texts):
    """Conversations: tokens that end with `eos_id` unless it is None, their labels unless all are targets, rewards."""

    template: ChatTemplate
    options: ChatOptions
    eos_id: int | None

    @property
    def named(self) -> bool:
        """As GPT-NeoX names them, PREFIX_KEY_document."""
        return True

    @property
    def facts(self) -> dict[str, Any]:
        """For PREFIX.json."""
        template = {
            "template": self.template.where,
            "template_sha256": sha256(self.template.text.encode()).hexdigest(),
        }
        return {"chat": {**asdict(self.options), **template, "eos_id": self.eos_id}}

    def kinds(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """int32 throughout, as GPT-NeoX; rewards are float32."""
        kinds = {TOKENS: np.dtype("<i4")}
        if self.options.mask:
            kinds[LABELS] = np.dtype("<i4")
        return kinds if self.options.reward is None else kinds | {REWARDS: np.dtype("<f4")}

    def wanted(
        self, keys: Sequence[str], keep: Sequence[str], mend: Callable[[str], str] | None
    ) -> Wanted:
        """What to take of each line."""
        return WantedChats(
            tuple(keys), tuple(keep), mend, template=self.template, options=self.options
        )

    def encode(self, encoder: Encoder, texts: Sequence[bytes]) -> list[Encoded]:
        """Tokens, labels and rewards of conversations."""
        chats = cast(Sequence[Chat], texts)
        prefixes = prefix_ids(encoder, chats)
        found = [self.labelled(encoder, one, [next(prefixes) for _ in one.ends]) for one in chats]
        lengths = np.array([len(tokens) for tokens, _ in found], np.int64)
        if not lengths.all():
            raise DataError(
                "the tokenizer gives no token for a conversation; nothing can be learned from it"
            )
        streams = [np.concatenate(stream) for stream in zip(*found, strict=True)]
        rewards = np.array([one.reward for one in chats], "<f4"), np.ones(len(chats), np.int64)
        by_kind = {TOKENS: (streams[0], lengths), LABELS: (streams[1], lengths), REWARDS: rewards}
        return [by_kind[kind] for kind in self.kinds(encoder.tokenizer)]

    def labelled(self, encoder: Encoder, one: Chat, prefixes: list[Ints]) -> tuple[Ints, Ints]:
        """Tokens and labels, (n,) each, of a conversation whose texts up to the end of each message are `prefixes`."""
        tokens = labels = np.empty(0, np.int32)
        start = 0
        for longer, end, is_target in zip(prefixes, one.ends, one.targets, strict=True):
            own = longer[len(tokens) :]
            if not np.array_equal(longer[: len(tokens)], tokens):  # a token reaches over the border
                own, _ = encoder([bytes(one[start:end])])
            tokens, start = np.append(tokens, own.astype(np.int32)), end
            labels = np.append(
                labels,
                own.astype(np.int32) if is_target else np.full(len(own), IGNORED, np.int32),
            )
        for token, label in self.ends(is_target=bool(len(labels)) and labels[-1] != IGNORED):
            tokens, labels = np.append(tokens, np.int32(token)), np.append(labels, np.int32(label))
        return tokens, labels

    def ends(self, *, is_target: bool) -> list[tuple[int, int]]:
        """Tokens that end a conversation, with their labels; `is_target` says whether its last token is one."""
        eos = self.eos_id
        if eos is None or not self.options.mask:
            return []
        if (
            self.options.for_rm
        ):  # inputs end one token before targets do, so the model sees the first of the two
            return [(eos, IGNORED), (eos, eos)]
        return [(eos, eos if is_target else IGNORED)]


def prefix_ids(encoder: Encoder, chats: Sequence[Chat]) -> Iterator[Ints]:
    """Ids of each conversation's text up to the end of each of its messages, a few MiB of text at a time."""
    held: list[bytes] = []
    size = 0
    for one in chats:
        for end in one.ends:
            held.append(bytes(one[:end]))
            size += end
            if size >= PREFIX_BYTES:
                yield from pieces_of(*encoder(held))
                held, size = [], 0
    if held:
        yield from pieces_of(*encoder(held))
