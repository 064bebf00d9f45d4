"""`castalia demo`."""

import sys
from typing import Annotated

import typer


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=c ...]", help="Overrides, such as train.steps=200."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the run.")
    ] = "runs/demo",
) -> None:
    """Go from text on this machine to a trained, exported, quantized model, in a few minutes.

    The demo builds a corpus from the text of this Python installation, trains a tokenizer and a
    small Pythia, measures bits per byte of held-out text at every checkpoint, exports to Hugging
    Face and CTranslate2, and writes a report page. The same command again continues where it
    stopped, or says that it is done.

    Example:

      castalia demo train.steps=200 --output runs/short
    """
    from castalia.demo.stages import run_demo

    run_demo(overrides or [], output, command=["castalia", *sys.argv[1:]])
