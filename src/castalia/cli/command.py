"""`Verbs`: a typer app whose help reads as it is written: whole paragraphs, plain usage lines."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

LARGEST_SHOWN = 1_000_000
"""Bound of a number up to which help shows its range."""


class Command(TyperCommand):
    """A verb as typer runs it."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.help = wrapped_by_terminal(self.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        """The arguments and options, with `--help`."""
        params = super().get_params(ctx)
        for param in params:
            show_type(param)
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse `--train.steps=5` and `--lr`, which users of other libraries type, in words that
        help.

        Raises  ConfigError. No option of ours has a dot in its name.
        """
        from castalia.core.errors import ConfigError

        for word in args:
            if re.match(r"--[a-z_]+\.[\w.]+", word):
                raise ConfigError(f"{word}: write overrides without dashes: {word.lstrip('-')}")
        # Completion asks with half a word.
        if not ctx.resilient_parsing and any(param.name == "config" for param in self.params):
            self.refuse_keys(ctx, args)
        return super().parse_args(ctx, args)

    def refuse_keys(self, ctx: Any, args: list[str]) -> None:
        """Refuse an option that is not ours in favour of the key of a config that it may mean.

        Raises  ConfigError.
        """
        from castalia.cli.hints import unknown_option
        from castalia.core.errors import ConfigError

        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        known = [name for param in options for name in [*param.opts, *param.secondary_opts]]
        for word in args:
            name = word.split("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in known:
                raise ConfigError(unknown_option(name, known))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] CONFIG... [a.b=c ...]`: typer puts braces around metavars of our own."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        pieces = [str(param.metavar or param.name).strip() for param in arguments]
        if len(arguments) < len(self.params):
            pieces.insert(0, "[OPTIONS]")
        return pieces


class Group(TyperGroup):
    """A verb with verbs of its own, and the command itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, also those of completion, which typer adds late."""
        params = super().get_params(ctx)
        for param in params:
            show_type(param)
        return params

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` begin with.

        Raises  ConfigError for an unknown one, with the verb that does it.
        """
        from castalia.cli.hints import unknown_verb
        from castalia.core.errors import ConfigError

        word = args[0]
        # Completion asks for the verbs of a line that is not finished.
        if word in self.commands or word.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        everywhere = all_verbs(ctx.find_root().command)
        raise ConfigError(unknown_verb(word, ctx.command_path, self.commands, everywhere))


def all_verbs(group: Any, path: str = "") -> Iterator[str]:
    """The verbs of a group and of the groups in it, each with the words that lead to it."""
    for name, verb in group.commands.items():
        yield path + name
        if hasattr(verb, "commands"):
            yield from all_verbs(verb, f"{path}{name} ")


def show_type(param: Any) -> None:
    """What help shows as the type: no Python types, which typer would."""
    if param.param_type_name == "argument":
        # The usage line and the first column have its name.
        param.display_type_rich = lambda ctx: ""
    elif param.metavar is None:
        is_flag = getattr(param, "is_flag", False)
        param.metavar = "" if is_flag else str(param.name).split("_")[-1].upper()
    if (getattr(param, "max", None) or 0) > LARGEST_SHOWN:
        # The range of an int64 is wider than the column for the help.
        param._get_number_range_help_str = lambda: None


class Verbs(typer.Typer):
    """A typer app of which every command is a `Command`."""

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {"cls": Group, "no_args_is_help": True}
        super().__init__(**(defaults | settings))

    def command(  # type: ignore[override]
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As typer's decorator."""
        return super().command(name, **({"cls": Command} | settings))


def wrapped_by_terminal(text: str) -> str:
    """A docstring with one line a paragraph, so that the terminal alone breaks lines.

    rich keeps the line breaks of the source, which fall mid-sentence on any other width. Indented
    paragraphs are examples; consecutive ones stand together.
    """
    paragraphs: list[str] = []
    was_example = False
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        is_example = paragraph.startswith("  ")
        line = " ".join(paragraph.split())
        if is_example and was_example:
            paragraphs[-1] += f"\n{line}"
        else:
            paragraphs.append(line)
        was_example = is_example
    return "\n\n".join(paragraphs)
