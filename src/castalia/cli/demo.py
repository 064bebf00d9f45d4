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
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.5,
            help="Time for everything, by default 4: training, bits per byte and samples shrink to"
            " what this machine does in it. With train.steps= or --tokens nothing shrinks.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Train on N tokens, however long it takes."),
    ] = None,
) -> None:
    """Go from text on this machine to a trained, exported, quantized model, in a few minutes.

    The demo builds a corpus from the text of this Python installation, trains a tokenizer and a
    small Pythia, measures bits per byte of held-out text at every checkpoint, exports to Hugging
    Face and CTranslate2, and writes a report page. A few steps are timed first, and the demo is as
    large as fits in 4 minutes. The same command again continues where it stopped, with the same
    size, or says that it is done.

    Example:

      castalia demo --minutes 2 --output runs/short
    """
    from castalia.demo.stages import DemoRequest, run_demo

    request = DemoRequest(overrides or [], minutes, tokens)
    run_demo(request, output, command=["castalia", *sys.argv[1:]])
