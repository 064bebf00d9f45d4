"""The options of `castalia prepare` in groups, each group a panel of its help."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import panel

if TYPE_CHECKING:
    from castalia.corpus import ChatOptions, FimOptions

INPUT = panel("Input")
OUTPUT = panel("Output")
TOKENS = panel("Tokenizer")
CHAT = panel("Chat")
FIM = panel("Fill-in-the-middle")
CLUSTER = panel("Cluster")

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT...",
        help="Text files (one document each), JSON lines (.jsonl, .ndjson, .json), .tar or .zip of"
        " these, .gz, .zst or .xz of any of them; .parquet; .arrow; folders, also those of"
        " `datasets`; patterns such as 'part-*.jsonl.zst'; URLs; corpora by name, see --list.",
    ),
]


@dataclass(frozen=True)
class InputFlags:
    """Options about the documents that are read."""

    key: Annotated[
        list[str] | None,
        INPUT(
            metavar="KEY",
            help="Key or column of the text, by default `text`; each of several is written to"
            " PREFIX_KEY_document.",
        ),
    ] = None
    ftfy: Annotated[bool, INPUT("--ftfy", help="Repair broken Unicode with ftfy first.")] = False
    num_docs: Annotated[
        int | None, INPUT(metavar="N", min=1, help="Read at most this many documents.")
    ] = None
    on_error: Annotated[
        str,
        INPUT(
            metavar="stop|reject",
            help="At a bad document stop, or write it to PREFIX.rejects.jsonl and continue.",
        ),
    ] = "stop"
    corpora: Annotated[
        str, INPUT(metavar="FOLDER", help="Folder for the downloads of corpora given by name.")
    ] = "corpora"
    list_corpora: Annotated[
        bool, INPUT("--list", help="List the corpora that have a name, and exit.")
    ] = False

    def texts(self) -> tuple[str, ...]:
        """The keys of the text."""
        return split_names(",".join(self.key or ["text"]))

    def rejects(self) -> bool:
        """Whether bad documents are rejected.

        Raises  ConfigError about another word.
        """
        from castalia.core.errors import ConfigError

        if self.on_error not in ("stop", "reject"):
            raise ConfigError(f"--on-error {self.on_error}: expected stop or reject")
        return self.on_error == "reject"


@dataclass(frozen=True)
class TokenFlags:
    """Options about the tokenizer."""

    tokenizer: Annotated[
        str,
        TOKENS(
            metavar="FILE|HUB_ID",
            help="A tokenizer.json or its folder, a run, OWNER/NAME of the hub, `bytes`, `char`,"
            " VOCAB.json,MERGES.txt, X.tiktoken or a SentencePiece X.model.",
        ),
    ] = ""
    train_tokenizer: Annotated[
        int | None,
        TOKENS(
            metavar="N",
            min=1,
            help="First train a BPE of N ids on INPUT and write it to --tokenizer.",
        ),
    ] = None
    append_eod: Annotated[
        bool,
        TOKENS("--append-eod", help="End each document with the end-of-document token."),
    ] = False
    eod: Annotated[
        str | None,
        TOKENS(
            metavar="TOKEN",
            help="The token (or its id) that ends each document or conversation; by default the one"
            " that the tokenizer's folder names, else <|endoftext|> or its kin.",
        ),
    ] = None
    fast: Annotated[
        bool, TOKENS(help="Encode with gigatoken where its ids equal those of tokenizers.")
    ] = True


@dataclass(frozen=True)
class OutputFlags:
    """Options about the files that are written."""

    output: Annotated[
        str,
        OUTPUT(
            metavar="PREFIX",
            help="Write PREFIX.bin, PREFIX.idx, PREFIX.json and the index of documents.",
        ),
    ] = ""
    documents: Annotated[
        bool | None,
        OUTPUT(help="Record the origin of each document; the default if pyarrow is installed."),
    ] = None
    keep: Annotated[
        str,
        OUTPUT(
            metavar="A,B", help="Metadata to keep in PREFIX.documents.parquet, beside the `id`."
        ),
    ] = ""
    overwrite: Annotated[
        bool,
        OUTPUT(
            "--overwrite",
            help="Replace token files of another job that are there; those of the same job stay.",
        ),
    ] = False
    as_json: Annotated[bool, OUTPUT("--json", help="Print the summary as JSON.")] = False


@dataclass(frozen=True)
class ClusterFlags:
    """Options about the processes and machines that tokenize."""

    workers: Annotated[
        int,
        CLUSTER(metavar="N", min=1, help="Processes that tokenize; the output is the same."),
    ] = 1
    shard: Annotated[
        str,
        CLUSTER(
            metavar="I/N",
            help="Tokenize share I (from 0) of N only; `castalia data merge` joins the shares.",
        ),
    ] = "0/1"
    engine: Annotated[
        str, CLUSTER(metavar="local|ray", help="ray: tokenize on the machines of a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None, CLUSTER(help="Address of the Ray cluster; by default one is started here.")
    ] = None

    def share(self) -> tuple[int, int]:
        """`I/N` as two numbers.

        Raises  ConfigError if it is not of that form.
        """
        from castalia.core.errors import ConfigError

        index, _, count = self.shard.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise ConfigError(
                f"--shard {self.shard}: expected I/N, such as 0/16 for the first of sixteen shares"
            )
        return int(index), int(count)


@dataclass(frozen=True)
class ChatFlags:
    """Options about conversations."""

    chat: Annotated[
        list[str] | None,
        CHAT(
            metavar="KEY",
            help="Key of messages (OpenAI's form or ShareGPT's); repeat it for preference pairs.",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        CHAT(metavar="FILE", help="A Jinja template; by default that of the tokenizer's folder."),
    ] = None
    chat_date: Annotated[
        str | None,
        CHAT(
            metavar="YYYY-MM-DD",
            help="The day that a template which asks for it is told; by default today.",
        ),
    ] = None
    generation_role: Annotated[
        str, CHAT(metavar="A,B", help="Roles whose messages are targets; others get -100.")
    ] = "assistant"
    only_last: Annotated[bool, CHAT("--only-last", help="Only the last message is a target.")] = (
        False
    )
    no_mask: Annotated[
        bool, CHAT("--no-mask", help="Every token is a target; no label file is written.")
    ] = False
    for_rm: Annotated[
        bool, CHAT("--for-rm", help="The only target is an added end of text, for reward models.")
    ] = False
    prompt: Annotated[
        str | None, CHAT(metavar="KEY", help="Key of messages or a text before the conversation.")
    ] = None
    reward_key: Annotated[
        str | None, CHAT(metavar="KEY", help="Key of the reward of each conversation.")
    ] = None
    binary_reward: Annotated[
        bool, CHAT("--binary-reward", help="The reward is 1 if true, else -1.")
    ] = False

    def keys(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """The keys of the conversations, else those of the `texts`.

        Raises  ConfigError if both are given.
        """
        from castalia.core.errors import ConfigError

        if not self.chat:
            return texts
        if texts != ("text",):
            raise ConfigError("--key names texts and --chat conversations; give one of the two")
        return tuple(self.chat)

    def options(self) -> "ChatOptions | None":
        """As `prepare` takes them; None without --chat.

        Raises  ConfigError about an option that has no effect without it.
        """
        from castalia.core.errors import ConfigError
        from castalia.corpus.chats import ChatOptions

        if not self.chat:
            if self != ChatFlags(chat=self.chat):
                raise ConfigError(
                    "options about conversations need --chat KEY, the key of their messages"
                )
            return None
        return ChatOptions(
            template=self.chat_template,
            date=self.chat_date,
            roles=split_names(self.generation_role),
            only_last=self.only_last,
            mask=not self.no_mask,
            for_rm=self.for_rm,
            prompt=self.prompt,
            reward=self.reward_key,
            binary=self.binary_reward,
        )


@dataclass(frozen=True)
class FimFlags:
    """Options about filling in the middle."""

    fim_rate: Annotated[
        float | None,
        FIM(metavar="SHARE", help="Share of documents that are cut for filling in the middle."),
    ] = None
    spm_rate: Annotated[
        float, FIM(metavar="SHARE", help="Share of these with the suffix before the prefix.")
    ] = 0.5
    fim_tokens: Annotated[
        str,
        FIM(
            metavar="PRE,MID,SUF",
            help="Names or ids of the three tokens; by default the tokenizer's own.",
        ),
    ] = ""
    fim_seed: Annotated[int, FIM(metavar="N", help="Seed of the choice of documents and cuts.")] = 0
    fim_epoch: Annotated[
        int, FIM(metavar="N", min=0, help="Another number gives other cuts, for another epoch.")
    ] = 0

    def options(self) -> "FimOptions | None":
        """As `prepare` takes them; None without --fim-rate.

        Raises  ConfigError about an option that has no effect without it.
        """
        from castalia.core.errors import ConfigError
        from castalia.corpus.fim import FimOptions

        if self.fim_rate is None:
            if self != FimFlags():
                raise ConfigError("options about filling in the middle need --fim-rate SHARE")
            return None
        tokens = split_names(self.fim_tokens) or None
        return FimOptions(self.fim_rate, self.spm_rate, tokens, self.fim_seed, self.fim_epoch)


def split_names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
