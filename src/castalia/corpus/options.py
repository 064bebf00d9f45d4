"""Options of `prepare`, their checks, and the form of the documents that follows from them."""

from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError
from castalia.core.extras import pip_command
from castalia.corpus.chat_template import ChatTemplate, read_chat_template
from castalia.corpus.chats import ChatForm, ChatOptions
from castalia.corpus.extents import PART_BYTES
from castalia.corpus.fim import FimOptions, make_fim
from castalia.corpus.forms import TextForm
from castalia.corpus.provenance import OWN
from castalia.data.fim import token_id
from castalia.tokenizers.settings import read_settings
from castalia.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """How a corpus is prepared."""

    append_eod: bool = False
    """End each document with the tokenizer's end-of-document token."""
    eod: str | None = None
    """The end-of-document token, by its text or its id; None takes the one that the tokenizer's
    folder names, else a known name. Given, it ends each document, and each conversation."""
    keys: tuple[str, ...] = ("text",)
    """Keys of the text; each of several gets an output of its own, PREFIX_KEY_document."""
    keep: tuple[str, ...] = ()
    """Metadata for the document index."""
    ftfy: bool = False
    """Mend broken Unicode with ftfy first."""
    max_documents: int | None = None
    """Documents to read at most, empty ones included."""
    reject: bool = False
    """Write a faulty document to PREFIX.rejects.jsonl and continue."""
    fast: bool = True
    """Let gigatoken encode where it agrees with the tokenizer."""
    documents: bool | None = None
    """Whether to write the document index; None writes it if pyarrow is installed."""
    workers: int = 1
    """Processes that encode; 1 is this one."""
    shard: tuple[int, int] = (0, 1)
    """(i, n) prepares share i, from 0, of n."""
    engine: str = "local"
    """`local` processes, or a `ray` cluster."""
    address: str | None = None
    """Of the Ray cluster; None starts one on this machine."""
    part_bytes: int = PART_BYTES
    """Bytes of text in a part, about."""
    chat: ChatOptions | None = None
    """The keys hold conversations."""
    fim: FimOptions | None = None
    """Documents are transformed to fill in the middle."""
    form: TextForm | None = None
    """What the documents are, in place of what `chat` and `fim` say."""

    def check(self) -> None:
        """Check all options.

        Raises  ConfigError listing every problem.
        """
        # Values of a wrong type would break the other checks.
        problems = self.type_problems()
        if not problems:
            problems = self.name_problems() + self.package_problems()
            problems += self.share_problems() + self.form_problems()
        if problems:
            raise ConfigError("; ".join(problems))

    def type_problems(self) -> list[str]:
        """Values of a wrong type, which only Python callers can pass."""
        problems = []
        counts = {
            "--workers": self.workers,
            "--num-docs": self.max_documents,
            "part_bytes": self.part_bytes,
        }
        for name, value in counts.items():
            if value is not None and (not isinstance(value, Integral) or value < 1):
                problems.append(f"{name} {value!r}: expected an integer of at least 1")
        for name, names in (("keys", self.keys), ("keep", self.keep)):
            if isinstance(names, str) or not all(isinstance(entry, str) for entry in names):
                problems.append(f"{name} {names!r}: expected a sequence of names, ({names!r},)")
        if isinstance(self.shard, str) or len(self.shard) != 2:
            problems.append(f"shard {self.shard!r}: expected two integers, such as (0, 16)")
        return problems

    def name_problems(self) -> list[str]:
        """Missing, repeated and reserved names."""
        problems = []
        if not self.keys:
            problems.append("--key: name the key of the text")
        if len(set(self.keys)) != len(self.keys):
            problems.append(f"--key {', '.join(self.keys)}: a key is repeated; give each once")
        if len(set(self.keep)) != len(self.keep):
            problems.append(f"--keep {', '.join(self.keep)}: a name is repeated; give each once")
        reserved = sorted(set(self.keep) & set(OWN))
        if reserved:
            problems.append(
                f"--keep {', '.join(reserved)}: the document index has columns of that name; rename"
                " yours in the corpus"
            )
        return problems

    def package_problems(self) -> list[str]:
        """Options whose package is missing or whose purpose is turned off."""
        problems = []
        if self.keep and (self.documents is False or not has_pyarrow()):
            problems.append(
                f"--keep needs the document index, and that needs pyarrow: {pip_command('parquet')}"
            )
        if self.documents and not has_pyarrow():
            problems.append(
                f"--documents needs 'pyarrow', which is not installed: {pip_command('parquet')}"
            )
        if self.ftfy and find_spec("ftfy") is None:
            problems.append(f"--ftfy needs 'ftfy', which is not installed: {pip_command('ftfy')}")
        return problems

    def share_problems(self) -> list[str]:
        """Invalid shares and cluster options."""
        problems = []
        index, count = self.shard
        if count < 1:
            problems.append(f"--shard {index}/{count}: expected at least one share, such as 0/16")
        elif not 0 <= index < count:
            problems.append(
                f"--shard {index}/{count}: shares count from 0; expected 0/{count} to"
                f" {count - 1}/{count}"
            )
        if self.max_documents is not None and count > 1:
            problems.append(
                "--num-docs and --shard exclude each other: a share does not know how many"
                " documents precede it"
            )
        if self.address is not None and self.engine != "ray":
            problems.append(f"--address {self.address} needs --engine ray")
        return problems

    def form_problems(self) -> list[str]:
        """Invalid options of chats and fill-in-the-middle."""
        problems = []
        if self.chat is not None:
            problems += self.chat.problems()
        if self.fim is not None:
            problems += self.fim.problems()
        if self.chat is not None and self.fim is not None:
            problems.append(
                "--chat and --fim-rate exclude each other: conversations are not transformed"
            )
        if self.chat is not None and self.append_eod:
            problems.append(
                "--append-eod and --chat exclude each other: the tokenizer's eos_token ends each"
                " conversation already"
            )
        return problems


class DocumentEnd(NamedTuple):
    """The token after each document, and who named it."""

    id: int
    token: str
    named_by: str
    """`--eod`, a file of the tokenizer's folder, or `known name`."""


def document_end(options: PrepareOptions, tokenizer: Tokenizer) -> DocumentEnd | None:
    """The end-of-document token that the options ask for; None if they ask for none.

    Raises  ConfigError if the tokenizer has no such token.
    """
    if options.eod is not None:
        number = token_id(options.eod, tokenizer, "--eod")
        return DocumentEnd(number, tokenizer.tokens()[number], "--eod")
    if not options.append_eod:
        return None
    named = tokenizer.end
    if named is not None and tokenizer.id_of(named.token) is None:
        raise ConfigError(
            f"{tokenizer.where} lacks the token {named.token!r}, which {named.file} beside it names"
            " as the end of a text; name one with --eod TOKEN"
        )
    eod_id = tokenizer.eod_id
    if eod_id is None:
        raise ConfigError(
            f"{tokenizer.where} has no end-of-document token such as <|endoftext|>, and no file"
            " beside it names one; name it with --eod TOKEN, or leave out --append-eod"
        )
    named_by = "known name" if named is None else named.file
    return DocumentEnd(eod_id, tokenizer.tokens()[eod_id], named_by)


def has_pyarrow() -> bool:
    """Whether the document index can be written."""
    try:
        return find_spec("pyarrow") is not None
    except ValueError:  # a module without a spec
        return False


def form_of(options: PrepareOptions, tokenizer: Tokenizer) -> TextForm:
    """The form of the documents.

    Raises  ConfigError if the tokenizer lacks a chat template, an end of text, or the tokens of
            fill-in-the-middle where they are needed; DataError if a template cannot be read.
    """
    if options.form is not None:
        return options.form
    if options.fim is not None:
        return make_fim(options.fim, tokenizer)
    if options.chat is not None:
        return make_chats(options.chat, tokenizer, options.eod)
    return TextForm()


def make_chats(options: ChatOptions, tokenizer: Tokenizer, eod: str | None) -> ChatForm:
    """The form of conversations, by the given template or that of the tokenizer's folder; each ends
    with the token `eod`, by default the tokenizer's eos_token."""
    file = Path(tokenizer.where)
    folder = file.parent if file.is_file() else None
    template = read_chat_template(folder, options.template)
    settings = read_settings(folder)
    if template is None:
        raise ConfigError(
            f"{tokenizer.where} has no chat template beside it (chat_template.jinja, or in"
            " tokenizer_config.json); name one with --chat-template FILE"
        )
    require_tokens(tokenizer, settings, template)
    if eod is None:
        eos_id = eos_of(tokenizer, settings, template)
    else:
        eos_id = token_id(eod, tokenizer, "--eod")
    if options.for_rm and eos_id is None:
        raise ConfigError(
            f"--for-rm: {tokenizer.where} has no eos_token, which is the reward model's only target"
        )
    return ChatForm(template, options, eos_id)


def eos_of(tokenizer: Tokenizer, settings: dict[str, Any], template: ChatTemplate) -> int | None:
    """The id that ends a conversation: the eos_token of the settings, if there are any."""
    if not settings:
        return tokenizer.eod_id
    eos = dict(template.tokens).get("eos_token")
    if eos is None:
        return None
    return tokenizer.ids[eos]


def require_tokens(tokenizer: Tokenizer, settings: dict[str, Any], template: ChatTemplate) -> None:
    """Require the tokens that the tokenizer's settings name.

    Without them the template's special tokens would be split into letters, silently.
    Raises  ConfigError naming one that is missing.
    """
    added = settings.get("added_tokens_decoder")
    names = []
    if isinstance(added, dict):
        names = [entry.get("content") for entry in added.values()]
    for token in [*names, dict(template.tokens).get("eos_token")]:
        if token is not None and token not in tokenizer.ids:
            raise ConfigError(
                f"{tokenizer.where} lacks the token {token!r}, which tokenizer_config.json beside"
                " it names; save the tokenizer again, so that both files match"
            )
