"""`castalia mixing …`: what a mixture is measured against, and what became of it."""

from typing import Annotated

import typer

app = typer.Typer(
    help="Reference losses by source, and the picture of a run's mixture.", no_args_is_help=True
)


@app.command()
def reference(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run's folder, which means its newest checkpoint, or RUN/step1000."),
    ],
    prefixes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PREFIX]...",
            help="Token files, one a source; by default those it was trained on.",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option(metavar="FILE", help="JSON file to write.")
    ] = "reference.json",
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of each source that are read, at most.")
    ] = 256,
) -> None:
    """Losses of a checkpoint by source, in nats a token, for mixing.kind=doremi and mixing.reference=FILE.

    Example:

      castalia mixing reference runs/small --output reference.json
    """
    from castalia.checkpoint import find_checkpoint
    from castalia.config import read_yaml
    from castalia.core.errors import ConfigError
    from castalia.eval import write_reference

    found = find_checkpoint(checkpoint)
    data = read_yaml(found / "config.yaml")["data"]
    sources = prefixes or data["train"]
    if not sources:
        raise ConfigError(
            f"{found} does not say what it was trained on; name the token files, one a source"
        )
    scores = write_reference(output, found, sources, seq_length=data["seq_length"], rows=rows)
    for name, entry in scores["sources"].items():
        typer.echo(f"{name}: {entry['loss']:.4f} nats a token over {entry['tokens']:,} tokens")
    typer.echo(f"written to {output}; mixing.reference={output} reads it")


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write RUN/report.html, with the shares, losses and epochs of each source."""
    from castalia.analysis import write_report

    typer.echo(str(write_report(run)))
