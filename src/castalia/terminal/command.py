"""`Verbs`: a typer app whose help reads as it is written: whole paragraphs, plain usage lines."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

USAGE_ERROR: Any = typer.BadParameter.__base__
"""What the parser of the command line raises; typer does not export it."""
LARGEST_SHOWN = 1_000_000
"""Bound of a number up to which help shows its range."""


class Command(TyperCommand):
    """A verb as typer runs it."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.help = wrapped_by_terminal(self.help or "")

    def get_params(self, ctx: Any) -> list[Any]:
        """The arguments and options, with `--help`."""
        return with_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse `--train.steps=5`, which users of other libraries type, and what the parser
        refuses, in words that help.

        Raises  ConfigError. No option of ours has a dot in its name.
        """
        from castalia.core.errors import ConfigError

        for word in args:
            if re.match(r"--[a-z_]+\.[\w.]+", word):
                raise ConfigError(f"{word}: write overrides without dashes: {word.lstrip('-')}")
        with in_one_sentence(ctx, self.help or ""):
            return super().parse_args(ctx, args)

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
        return with_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's; what it refuses is one sentence.

        Raises  ConfigError.
        """
        if not args:  # the help, which typer prints by way of an error
            return super().parse_args(ctx, args)
        with in_one_sentence(ctx, ""):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that `args` begin with.

        Raises  ConfigError for an unknown one, with the verb that does it.
        """
        from castalia.core.errors import ConfigError
        from castalia.terminal.hints import unknown_verb

        word = args[0]
        # Completion asks for the verbs of a line that is not finished.
        if word in self.commands or word.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        everywhere = all_verbs(ctx.find_root().command)
        raise ConfigError(unknown_verb(word, ctx.command_path, self.commands, everywhere))


@contextmanager
def in_one_sentence(ctx: Any, help_text: str) -> Iterator[None]:
    """Turn what the parser of the command line says into a sentence like those of our own checks.

    Raises  ConfigError: what is missing, unknown or wrong, and an example of the help where words
            are missing or too many.
    """
    from castalia.core.errors import ConfigError

    try:
        yield
    except USAGE_ERROR as error:
        # Completion asks with half a line.
        if ctx.resilient_parsing:
            raise
        raise ConfigError(usage_problem(ctx, error, first_example(help_text))) from None


def usage_problem(ctx: Any, error: Any, example: str) -> str:
    """What is wrong with the words of a command line, without a full stop."""
    from castalia.terminal.hints import unknown_option

    # By what they carry: typer keeps the classes in a private module.
    if hasattr(error, "possibilities"):
        options = [param for param in ctx.command.get_params(ctx) if is_option(param)]
        known = [name for param in options for name in [*param.opts, *param.secondary_opts]]
        takes_keys = any("a.b=c" in (param.metavar or "") for param in ctx.command.params)
        return unknown_option(error.option_name, known, ctx.command_path, takes_keys)
    param = getattr(error, "param", None)
    if hasattr(error, "param_type") and param is not None:
        name = param.opts[0] if is_option(param) else str(param.metavar or param.name).split()[0]
        return f"{ctx.command_path} needs {name.rstrip('.')}{example}"
    text = error.format_message().rstrip(".")
    text = re.sub(r"Input should be ([^,]*).*", r"expected \1", text)
    if text.startswith("Got unexpected"):
        words = text.partition("(s) ")[2].strip("()")
        return f"{ctx.command_path} does not expect {words!r}{example}"
    return f"{ctx.command_path}: {text[0].lower()}{text[1:]}"


def is_option(param: Any) -> bool:
    """Whether a parameter is written with dashes."""
    return bool(param.param_type_name == "option")


def first_example(help_text: str) -> str:
    """The first example of a help, for the end of an error; empty if there is none."""
    lines = [line for line in help_text.partition("Example")[2].splitlines()[1:] if line.strip()]
    return f"; for example: {lines[0].strip()}" if lines else ""


def all_verbs(group: Any, path: str = "") -> Iterator[str]:
    """The verbs of a group and of the groups in it, each with the words that lead to it."""
    for name, verb in group.commands.items():
        yield path + name
        if hasattr(verb, "commands"):
            yield from all_verbs(verb, f"{path}{name} ")


def with_types(params: list[Any]) -> list[Any]:
    """The parameters, each with what help shows as its type: no Python types, which typer would."""
    for param in params:
        if param.param_type_name == "argument":
            # The usage line and the first column have its name.
            param.display_type_rich = lambda ctx: ""
        elif param.metavar is None:
            is_flag = getattr(param, "is_flag", False)
            param.metavar = "" if is_flag else str(param.name).split("_")[-1].upper()
        if (getattr(param, "max", None) or 0) > LARGEST_SHOWN:
            # The range of an int64 is wider than the column for the help.
            param._get_number_range_help_str = lambda: None
    return params


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
