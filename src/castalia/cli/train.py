"""`castalia train`: train, or go on with, the run that a config describes."""

import sys
from typing import Annotated

import typer


def train(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [a.b=c ...]",
            help="A preset (debug, pythia-70m), YAML files (ours or GPT-NeoX's), then overrides such as optim.lr=3e-4.",
        ),
    ],
) -> None:
    """Train a model; the same command again continues from the newest good checkpoint.

    Examples:

      castalia train debug output=runs/first

      castalia train pythia-14m data.train=corpus data.tokenizer=tokenizer.json train.steps=1000

      torchrun --nproc-per-node 2 -m castalia train debug
    """
    from castalia.demo.corpus import ensure_corpus
    from castalia.recipes import resolve
    from castalia.train.run import Announced, run

    resolved = resolve(sources)
    run(
        resolved.config,
        ["castalia", *sys.argv[1:]],
        announced=Announced(resolved.changes, resolved.start_notes),
        prepare_data=ensure_corpus,
    )
