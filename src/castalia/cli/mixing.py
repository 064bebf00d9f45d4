"""`castalia mixing …`: reference losses for a mixture."""

from typing import Annotated

import typer

from castalia.terminal.command import Verbs

app = Verbs(help="Reference losses by source.")


@app.command()
def reference(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A run's folder (its newest checkpoint) or RUN/step1000."
        ),
    ],
    prefixes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PREFIX...]",
            help="Token files, one a source; by default those of the run's training.",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="JSON file to write.")
    ] = "reference.json",
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows to read of each source, at most.")
    ] = 256,
) -> None:
    """Measure a checkpoint's loss on each source, in nats a token.

    mixing.kind=doremi reads the file as mixing.reference=FILE.

    Example:

      castalia mixing reference runs/small --output reference.json
    """
    from castalia.checkpoint import find_checkpoint
    from castalia.config.anchor import CONFIG
    from castalia.core.errors import ConfigError
    from castalia.eval import write_reference
    from castalia.recipes import load_config

    folder = find_checkpoint(checkpoint)
    data = load_config([str(folder / CONFIG)]).data
    sources = prefixes or data.train_prefixes
    if not sources:
        raise ConfigError(
            f"the config of {folder} names no training data; name the token files, one a source"
        )
    scores = write_reference(output, folder, sources, seq_length=data.seq_length, rows=rows)
    for name, entry in scores["sources"].items():
        typer.echo(f"{name}: {entry['loss']:.4f} nats a token over {entry['tokens']:,} tokens")
    typer.echo(f"written to {output}; use it with mixing.reference={output}")


# Without a callback typer makes the only verb of a group the group itself: `castalia mixing RUN`.
@app.callback()
def root() -> None:
    """Reference losses by source."""
