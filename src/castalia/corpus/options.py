"""How a corpus is prepared: what a user may choose, and the form of the documents that follows from it."""

from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

from castalia.core.errors import ConfigError
from castalia.corpus.chat_template import ChatTemplate, compiled, read_chat_template, read_settings
from castalia.corpus.chats import ChatOptions, Chats
from castalia.corpus.fim import FimOptions, make_fim
from castalia.corpus.forms import Texts
from castalia.corpus.pieces import PART_BYTES
from castalia.corpus.provenance import OWN
from castalia.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """How a corpus is prepared.

    `keys` hold the text; with several each gets an output of its own, PREFIX_KEY_document. `keep` names metadata for
    the index of documents, `documents` whether there is one (None: if pyarrow is installed). `rows` is the most
    documents to read. `reject` goes on after a bad document and writes it to PREFIX.rejects.jsonl. `fast` lets
    gigatoken encode where it agrees with the tokenizer. `shard` is (i, n): share i, from 0, of n. `chat` says that the
    keys hold conversations, `fim` that documents are turned to fill in the middle.
    """

    append_eod: bool = False
    keys: tuple[str, ...] = ("text",)
    keep: tuple[str, ...] = ()
    ftfy: bool = False
    rows: int | None = None
    reject: bool = False
    fast: bool = True
    documents: bool | None = None
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    engine: str = "local"
    address: str | None = None
    part_bytes: int = PART_BYTES
    chat: ChatOptions | None = None
    fim: FimOptions | None = None

    def check(self) -> None:
        """Options that do not go together.

        Raises  ConfigError listing all.
        """
        if wrong := self.kind_problems():
            raise ConfigError("; ".join(wrong))
        if not self.keys:
            wrong.append("--key: name the key of the text")
        if len(set(self.keys)) != len(self.keys):
            wrong.append(f"--key {', '.join(self.keys)}: give each key once")
        if len(set(self.keep)) != len(self.keep):
            wrong.append(f"--keep {', '.join(self.keep)}: give each name once")
        if taken := sorted(set(self.keep) & set(OWN)):
            wrong.append(
                f"--keep {', '.join(taken)}: the index has columns of that name; rename yours in the corpus"
            )
        if self.keep and (self.documents is False or not has_pyarrow()):
            wrong.append(
                "--keep needs the index of documents, and that pyarrow: pip install 'castalia[parquet]'"
            )
        if self.documents and not has_pyarrow():
            wrong.append(
                "--documents needs 'pyarrow', which is not installed: pip install 'castalia[parquet]'"
            )
        if self.ftfy and find_spec("ftfy") is None:
            wrong.append(
                "--ftfy needs 'ftfy', which is not installed: pip install 'castalia[ftfy]'"
            )
        index, count = self.shard
        if count < 1:
            wrong.append(f"--shard {index}/{count}: expected at least one share, such as 0/16")
        elif not 0 <= index < count:
            wrong.append(
                f"--shard {index}/{count}: shares count from 0, so 0/{count} to {count - 1}/{count}"
            )
        if self.rows is not None and count > 1:
            wrong.append(
                "--num-docs and --shard do not go together: no share knows what the others hold"
            )
        if self.address is not None and self.engine != "ray":
            wrong.append(f"--address {self.address}: give --engine ray too, or leave it out")
        if wrong := wrong + self.form_problems():
            raise ConfigError("; ".join(wrong))

    def kind_problems(self) -> list[str]:
        """Values of another kind than they must be, which a command line does not let in."""
        counts = {"--workers": self.workers, "--num-docs": self.rows, "part_bytes": self.part_bytes}
        wrong = [
            f"{name} {value!r}: expected a whole number of at least 1"
            for name, value in counts.items()
            if value is not None and (not isinstance(value, Integral) or value < 1)
        ]
        for name, names in (("keys", self.keys), ("keep", self.keep)):
            if isinstance(names, str) or not all(isinstance(one, str) for one in names):
                wrong.append(f"{name} {names!r}: expected several names, such as ({names!r},)")
        if isinstance(self.shard, str) or len(self.shard) != 2:
            wrong.append(f"shard {self.shard!r}: expected two numbers, such as (0, 16)")
        return wrong

    def form_problems(self) -> list[str]:
        """What is wrong with the form of the documents."""
        wrong = [] if self.chat is None else self.chat.problems()
        wrong += [] if self.fim is None else self.fim.problems()
        if self.chat is not None and self.fim is not None:
            wrong.append("--chat and --fim-rate do not go together: conversations are not turned")
        if self.chat is not None and self.append_eod:
            wrong.append(
                "--append-eod: with --chat the tokenizer's eos_token ends each conversation; leave it out"
            )
        return wrong


def has_pyarrow() -> bool:
    """Whether the index of documents can be written."""
    try:
        return find_spec("pyarrow") is not None
    except ValueError:  # a module without a spec
        return False


def form_of(options: Options, tokenizer: Tokenizer) -> Texts:
    """The form of the documents.

    Raises  ConfigError if the tokenizer has no chat template, end of text or tokens for the middle where they are
            needed; DataError if a template cannot be read.
    """
    if options.fim is not None:
        return make_fim(options.fim, tokenizer)
    return Texts() if options.chat is None else make_chats(options.chat, tokenizer)


def make_chats(options: ChatOptions, tokenizer: Tokenizer) -> Chats:
    """Conversations by the template of the tokenizer's folder, or the one that is named."""
    file = Path(tokenizer.where)
    folder = file.parent if file.is_file() else None
    template, settings = read_chat_template(folder, options.template), read_settings(folder)
    if template is None:
        raise ConfigError(
            f"{tokenizer.where} has no chat template beside it (chat_template.jinja, or in tokenizer_config.json);"
            " name one with --chat-template FILE"
        )
    compiled(template.text, template.where)
    require_tokens(tokenizer, settings, template)
    eos = dict(template.tokens).get("eos_token")
    eos_id = tokenizer.eod_id if not settings else None if eos is None else tokenizer.ids[eos]
    if options.for_rm and eos_id is None:
        raise ConfigError(
            f"--for-rm: {tokenizer.where} has no eos_token, which is the reward model's one target"
        )
    return Chats(template, options, eos_id)


def require_tokens(tokenizer: Tokenizer, settings: dict[str, Any], template: ChatTemplate) -> None:
    """The tokenizer has the tokens that its settings count on.

    Raises  ConfigError naming one that it lacks.
    """
    added = settings.get("added_tokens_decoder")
    named = [one.get("content") for one in added.values()] if isinstance(added, dict) else []
    for token in [*named, dict(template.tokens).get("eos_token")]:
        if token is not None and token not in tokenizer.ids:
            raise ConfigError(
                f"{tokenizer.where} has no token {token!r}, which tokenizer_config.json beside it names; save the"
                " tokenizer again, both files at once"
            )
