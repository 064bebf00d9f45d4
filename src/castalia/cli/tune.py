"""`castalia tune`: the fastest way to compute a run on this machine."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import AsJson, Config, ConfigFolder, note

if TYPE_CHECKING:
    from castalia.tuning.search import Result, Tuned


def tune(
    config: Config,
    conf_dir: ConfigFolder = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="Seconds that measuring takes, about.")
    ] = 60,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a process; default: most of what is free."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML file of the overrides to write.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure micro-batch size, recompute and compile here, and print the fastest that fits.

    Each choice trains some steps in the real loop, in a process of its own. The batch of a step
    never changes, and nothing is written into the run's folder.

    Examples:

      castalia tune debug

      castalia tune pythia-70m data.train=data/c --memory 8GiB --output fast.yaml
    """
    from castalia.cli.scaling import print_table
    from castalia.core.errors import ConfigError
    from castalia.recipes import in_folder, load_config
    from castalia.tuning.report import bytes_of, table, write_overrides
    from castalia.tuning.search import tune as measure

    limit = None if memory is None else bytes_of(memory)
    tuned = measure(
        load_config(in_folder(conf_dir, config)), seconds=seconds, memory=limit, told=say
    )
    best = tuned.best
    if as_json:
        typer.echo(json.dumps(tuned.as_dict(), indent=2))
    else:
        print_table(*table(tuned))
        typer.echo("")
    if best is None:
        raise ConfigError("no choice could be measured; the table says why")
    if not as_json:
        print_best(tuned, best)
    if output is not None:
        file = write_overrides(tuned, output)
        note(f"written: {file}; `castalia train CONFIG {file}` takes it")


def say(result: "Result") -> None:
    """One line on stderr about a choice that is known: measuring takes a while."""
    choice = result.choice
    words = f"micro-batch {choice.micro}, recompute {choice.recompute}, compile {choice.compile}"
    known = f"{result.rate:,.0f} tokens/s" if result.rates else f"{result.status} {result.note}"
    note(f"{words}, {choice.precision}: {known}")


def print_best(tuned: "Tuned", best: "Result") -> None:
    """The overrides to pass, on the last line."""
    typer.echo(f"measured on {tuned.device} with {tuned.rows}; the fastest that fits:")
    typer.echo(" ".join(best.choice.words(tuned.config)))
