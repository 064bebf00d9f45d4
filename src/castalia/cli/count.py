"""`castalia count`: occurrences in the text that the steps of a run have read."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.cli.flags import AsJson, Config, grouped, panel

if TYPE_CHECKING:
    from castalia.stream.counting.asked import Terms
    from castalia.stream.counting.counting import Counts

WHAT = panel("What is counted")
FOUND = panel("What counts as found")
STEPS = panel("Steps")
SHOWN = 20
"""Labels that are printed without --top, where they are not listed."""


@dataclass(frozen=True)
class WhatFlags:
    """What is counted."""

    terms: Annotated[str | None, WHAT(metavar="FILE", help="Terms, one a line.")] = None

    def asked(self, found: "FoundFlags") -> "Terms":
        """What is to be counted.

        Raises  ConfigError if nothing or too much is; DataError if the file cannot be read.
        """
        from castalia.core.errors import ConfigError
        from castalia.stream.counting.asked import Terms, read_terms
        from castalia.stream.counting.terms import TermOptions

        if self.terms is None:
            raise ConfigError("say what to count: --terms FILE")
        options = TermOptions(found.substring, found.ignore_case, found.as_tokens)
        if options.as_tokens and (options.substring or options.ignore_case):
            raise ConfigError("--as-tokens compares ids: without --substring and --ignore-case")
        return Terms(tuple(read_terms(self.terms)), options)


@dataclass(frozen=True)
class FoundFlags:
    """What counts as an occurrence."""

    substring: Annotated[bool, FOUND("--substring", help="Terms also inside words.")] = False
    ignore_case: Annotated[bool, FOUND("--ignore-case", help="Upper and lower case alike.")] = False
    as_tokens: Annotated[
        bool, FOUND("--as-tokens", help="Terms by their ids, as the tokenizer encodes each alone.")
    ] = False


@dataclass(frozen=True)
class StepFlags:
    """Which steps are counted."""

    steps: Annotated[
        str | None,
        STEPS(metavar="A:B", help="Steps A to B - 1, counted from 0; by default all trained."),
    ] = None
    at: Annotated[
        str | None,
        STEPS(
            metavar="STEP,...",
            help="Report the counts before these checkpoints; by default those of the run.",
        ),
    ] = None

    def checkpoints(self) -> list[int] | None:
        """The steps of --at.

        Raises  ConfigError if they are no numbers.
        """
        from castalia.core.errors import ConfigError

        if self.at is None:
            return None
        words = [word.strip() for word in self.at.split(",")]
        if not all(word.isascii() and word.isdigit() for word in words):
            raise ConfigError(f"--at {self.at}: expected steps such as 0,100,400")
        return [int(word) for word in words]


@grouped
def count(
    config: Config,
    what: WhatFlags,
    found: FoundFlags,
    steps: StepFlags,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the JSON to a file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count terms in the text that the steps of a run have read.

    Terms are whole words: one that begins or ends with a letter, digit or underscore does not count
    inside a longer word. Text is searched as the steps saw it, row by row; a match that the end of
    a row or of a document cuts is not found.

    Counts are kept in RUN/counts by step, so counting again, or up to another step, is a look-up,
    and a run that trained on is counted on from there.

    Examples:

      castalia count runs/demo --terms words.txt

      castalia count runs/demo --terms words.txt --steps 0:100 --at 10,50 --json
    """
    from castalia.core.files import atomic_write
    from castalia.stream.counting.counting import count as count_stream
    from castalia.stream.counting.counting import default_jobs, json_of
    from castalia.stream.opening import open_stream
    from castalia.stream.viewing import parse_steps

    asked = what.asked(found)
    checkpoints = steps.checkpoints()
    stream = open_stream(config, say)
    first = 0
    stop = None
    if steps.steps is not None:
        chosen = parse_steps(steps.steps, stream.sizes, stream.steps)
        first = chosen.first
        stop = chosen.stop
    counts = count_stream(
        stream, asked, first=first, stop=stop, at=checkpoints, jobs=jobs or default_jobs()
    )
    shown = list(range(len(counts.labels)))
    record = json.dumps(json_of(counts, shown), ensure_ascii=False)
    if output is not None:
        with atomic_write(output) as file:
            file.write(record + "\n")
    if as_json:
        typer.echo(record)
    elif output is None:
        print_counts(counts, shown)


def say(text: str) -> None:
    """A note, beside what is printed."""
    typer.echo(text, err=True)


MOST_COLUMNS = 8
"""Checkpoints that the table shows; --json has all."""


def print_counts(counts: "Counts", shown: list[int]) -> None:
    """A table: a line a label, a column a checkpoint."""
    places = list(range(len(counts.checkpoints)))
    if len(places) > MOST_COLUMNS:
        # Evenly over the list, the last one among them.
        last = len(places) - 1
        places = sorted({last * i // (MOST_COLUMNS - 1) for i in range(MOST_COLUMNS)})
    labels = [counts.labels[number] for number in shown]
    width = max([len("term"), *map(len, labels)])
    heads = [f"step {counts.checkpoints[place]:,}" for place in places]
    typer.echo(f"{'term':<{width}}" + "".join(f"{head:>14}" for head in heads))
    for number, label in zip(shown, labels, strict=True):
        values = [f"{counts.counts[number, place]:>14,}" for place in places]
        typer.echo(f"{label:<{width}}" + "".join(values))
    typer.echo(f"{counts.tokens:,} tokens of steps {counts.first} to {counts.stop - 1}")
