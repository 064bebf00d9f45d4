"""The options of `castalia prepare` about conversations and about filling in the middle."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from castalia.corpus import ChatOptions, FimOptions


@dataclass(frozen=True)
class ChatFlags:
    """Options about conversations."""

    chat: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Key of messages (OpenAI's form or ShareGPT's); may come again, as for pairs.",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A Jinja template; else that of the tokenizer's folder."),
    ] = None
    generation_role: Annotated[
        str, typer.Option(metavar="A,B", help="Roles whose messages are targets; others get -100.")
    ] = "assistant"
    only_last: Annotated[
        bool, typer.Option("--only-last", help="Only the last message is a target.")
    ] = False
    no_mask: Annotated[
        bool, typer.Option("--no-mask", help="Every token is a target: no label file.")
    ] = False
    for_rm: Annotated[
        bool, typer.Option("--for-rm", help="Only an added end of text is: for reward models.")
    ] = False
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="KEY", help="Key of messages, or a text, that come first."
        ),
    ] = None
    reward_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key of a reward for each conversation.")
    ] = None
    binary_reward: Annotated[
        bool, typer.Option("--binary-reward", help="The reward is 1 if true, else -1.")
    ] = False

    def keys(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """The keys of the documents: of conversations, or else `texts`.

        Raises  ConfigError if both are given.
        """
        from castalia.core.errors import ConfigError

        if self.chat and texts != ("text",):
            raise ConfigError("--key names texts and --chat conversations; give one of the two")
        return tuple(self.chat) if self.chat else texts

    def options(self) -> "ChatOptions | None":
        """As `prepare` takes them; None without --chat.

        Raises  ConfigError about an option that has no meaning without it.
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
        typer.Option(
            metavar="SHARE", help="Cut this share of documents for filling in the middle."
        ),
    ] = None
    spm_rate: Annotated[
        float, typer.Option(metavar="SHARE", help="Of these, the share with the suffix first.")
    ] = 0.5
    fim_tokens: Annotated[
        str,
        typer.Option(
            metavar="PRE,MID,SUF",
            help="Names or ids of the three tokens; else the tokenizer's own.",
        ),
    ] = ""
    fim_seed: Annotated[int, typer.Option(help="Decides which documents, and where.")] = 0
    fim_epoch: Annotated[
        int, typer.Option(min=0, help="Other cuts of the same documents for another pass.")
    ] = 0

    def options(self) -> "FimOptions | None":
        """As `prepare` takes them; None without --fim-rate.

        Raises  ConfigError about an option that has no meaning without it.
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
