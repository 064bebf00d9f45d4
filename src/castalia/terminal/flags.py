"""Options that several verbs share, and options in groups, each group a panel of the help.

A group is a dataclass as a parameter of a verb: each of its fields is an option of its own.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CONFIG_HELP = (
    "A preset such as debug or pythia-70m, YAML files (ours or GPT-NeoX's) or a run's folder; then"
    " overrides such as optim.lr=3e-4. Later words win. `castalia show --keys` lists the keys."
)


def config_words(incomplete: str) -> list[tuple[str, str]]:
    """What a word of a config may become, with its help, for a shell's completion."""
    from castalia.terminal.completion import config_words

    return config_words(incomplete)


CONFIG = typer.Argument(
    metavar="CONFIG... [a.b=c ...]", help=CONFIG_HELP, autocompletion=config_words
)
Config = Annotated[list[str], CONFIG]
ConfigFolder = Annotated[
    str | None,
    typer.Option(
        "--conf-dir",
        "-d",
        metavar="DIR",
        help="Folder of the config files that are named: `-d configs 125M local_setup`.",
    ),
]


def checkpoint_words(incomplete: str) -> list[tuple[str, str]]:
    """What the word of a checkpoint may become, for a shell's completion."""
    from castalia.terminal.completion import checkpoint_words

    return checkpoint_words(incomplete)


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        autocompletion=checkpoint_words,
        help="A run, RUN/step1000, a checkpoint's folder, a Hugging Face folder, OWNER/NAME of its"
        " hub, an export, a GPT-NeoX checkpoint, Meta's LLaMA folder, a GGUF file of floats, or"
        " RWKV's .pth.",
    ),
]
TokenizerFile = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="FILE", help="A tokenizer.json, OWNER/NAME of the hub, or `bytes`."
    ),
]


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace token files of another job that are there."),
]


def note(text: str) -> None:
    """A line beside what a verb prints."""
    typer.echo(text, err=True)


@contextmanager
def notes_aside(as_json: bool) -> Iterator[None]:
    """Let what the block prints, such as the lines of a training, be notes beside a JSON value."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def panel(title: str) -> Callable[..., Any]:
    """`typer.Option` for the options of one panel of the help."""

    def option(*names: str, **settings: Any) -> Any:
        return typer.Option(*names, rich_help_panel=title, **settings)

    return option


ENGINE = panel("Engine")
HUB = panel("Hugging Face hub")
Private = Annotated[bool, HUB("--private", help="A repository that is created is private.")]
Endpoint = Annotated[
    str | None,
    HUB(
        metavar="URL", help="Address of another hub.", show_default="HF_ENDPOINT or huggingface.co"
    ),
]


@dataclass(frozen=True)
class EngineFlags:
    """Options about the engine that runs a model."""

    engine: Annotated[
        str,
        ENGINE(
            help="auto, native, torch, ct2, llama.cpp or openvino; auto is the engine of an export,"
            " native where it computes the model, else torch."
        ),
    ] = "auto"
    dtype: Annotated[
        str | None,
        ENGINE(
            help="fp32, bf16 or fp16; with native also int8, int4 and auto (int8). By default that"
            " of an export or a checkpoint: bf16, else fp32."
        ),
    ] = None
    cache: Annotated[
        str | None,
        ENGINE(help="native: keys and values in fp32, bf16 or int8.", show_default="fp32"),
    ] = None
    verify: Annotated[
        bool,
        ENGINE(
            "--verify/--no-verify",
            help="Compare the files of a checkpoint or an export with their recorded hashes.",
        ),
    ] = True


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it; it is called with its dataclasses built from the options."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # typer reads the signature: in place of each dataclass it sees the dataclass's fields.
    parameters = []
    annotations = {}
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            annotations[name] = hints[name]
            continue
        group_hints = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            annotations[field.name] = group_hints[field.name]
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=annotations[field.name],
                )
            )
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    return run
