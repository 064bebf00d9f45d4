"""`Verbs`: a typer app whose help reads as it is written: whole paragraphs, plain usage lines."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A verb as typer runs it."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.help = wrapped_by_terminal(self.help or "")
        for param in self.params:
            # typer shows <bool> beside every flag, which says nothing that the flag does not.
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse `--train.steps=5`, which users of other libraries type, in words that help.

        Raises  ConfigError. No option of ours has a dot in its name.
        """
        from castalia.core.errors import ConfigError

        for word in args:
            if re.match(r"--[a-z_]+\.[\w.]+", word):
                raise ConfigError(f"{word}: write overrides without dashes: {word.lstrip('-')}")
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] CONFIG... [a.b=c ...]`: typer puts braces around metavars of our own."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        pieces = [str(param.metavar or param.name).strip() for param in arguments]
        if len(arguments) < len(self.params):
            pieces.insert(0, "[OPTIONS]")
        return pieces


class Verbs(typer.Typer):
    """A typer app of which every command is a `Command`."""

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
