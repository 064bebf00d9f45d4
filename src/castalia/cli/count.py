"""`castalia count`: occurrences in the text that the steps of a run have read."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson, Config, grouped, note, panel

if TYPE_CHECKING:
    from castalia.stream.counting.asked import Asked
    from castalia.stream.counting.counting import Counts
    from castalia.stream.counting.ngrams import Ngrams
    from castalia.stream.counting.terms import TermOptions
    from castalia.stream.opening import Stream

WHAT = panel("What is counted")
FOUND = panel("What counts as found")
STEPS = panel("Steps")
SHOWN = 20
"""Lines that are printed without --top, where no file lists the terms; --json has them all."""
MOST_NGRAMS = 100
"""n-grams that are counted without --top."""


@dataclass(frozen=True)
class WhatFlags:
    """What is counted."""

    terms: Annotated[str | None, WHAT(metavar="FILE", help="Terms, one a line.")] = None
    regex: Annotated[
        str | None,
        WHAT(metavar="PATTERN", help="Matches, by their text or by that of group 1."),
    ] = None
    ngrams: Annotated[
        int | None, WHAT(metavar="N", help="The most frequent n-grams of tokens, exactly.")
    ] = None
    pairs_within: Annotated[
        int | None,
        WHAT(
            metavar="W",
            min=0,
            help="Unordered pairs of --terms, or of matches of --regex, with at most W words"
            " between them.",
        ),
    ] = None

    def asked(self, found: "FoundFlags") -> "Asked | Ngrams":
        """What is to be counted.

        Raises  ConfigError if nothing or too much is; DataError if the file cannot be read.
        """
        from castalia.core.errors import ConfigError
        from castalia.stream.counting.asked import Matches, Pairs, Terms, read_terms
        from castalia.stream.counting.ngrams import Ngrams

        given = [each for each in (self.terms, self.regex, self.ngrams) if each is not None]
        if len(given) != 1 or (self.ngrams is not None and self.pairs_within is not None):
            raise ConfigError(
                "say what to count by one of --terms FILE, --regex PATTERN, --ngrams N;"
                " --pairs-within W takes --terms or --regex"
            )
        found.check(self)
        if self.ngrams is not None:
            return Ngrams(self.ngrams, found.words, found.ignore_case)
        of: Terms | Matches
        if self.terms is not None:
            of = Terms(tuple(read_terms(self.terms)), found.options())
        else:
            of = Matches(self.regex or "", found.ignore_case, found.row_seconds)
        return of if self.pairs_within is None else Pairs(of, self.pairs_within)


@dataclass(frozen=True)
class FoundFlags:
    """What counts as an occurrence."""

    substring: Annotated[bool, FOUND("--substring", help="Terms also inside words.")] = False
    ignore_case: Annotated[bool, FOUND("--ignore-case", help="Upper and lower case alike.")] = False
    as_tokens: Annotated[
        bool, FOUND("--as-tokens", help="Terms by their ids, as the tokenizer encodes each alone.")
    ] = False
    words: Annotated[bool, FOUND("--words", help="n-grams of words instead of tokens.")] = False
    row_seconds: Annotated[
        float, FOUND(metavar="SECONDS", help="Time limit of a pattern in the text of one row.")
    ] = 10.0

    def options(self) -> "TermOptions":
        """How terms are found."""
        from castalia.stream.counting.terms import TermOptions

        return TermOptions(self.substring, self.ignore_case, self.as_tokens)

    def check(self, what: WhatFlags) -> None:
        """Raises  ConfigError for options that say nothing about what is counted."""
        from castalia.core.errors import ConfigError

        if self.as_tokens and (self.substring or self.ignore_case):
            raise ConfigError("--as-tokens compares ids: without --substring and --ignore-case")
        if what.terms is None and (self.as_tokens or self.substring):
            raise ConfigError("--as-tokens and --substring say how --terms are found")
        if what.ngrams is None and self.words:
            raise ConfigError("--words says what --ngrams are made of")
        if self.row_seconds <= 0:
            raise ConfigError(f"--row-seconds {self.row_seconds}: expected more than 0")


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
    top: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="The K most frequent only, most frequent first."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the JSON to a file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count terms, matches, pairs or n-grams in the text that the steps of a run have read.

    Terms are whole words: one that begins or ends with a letter, digit or underscore does not count
    inside a longer word. Text is searched as the steps saw it, row by row; a match that the end of
    a row or of a document cuts is not found.

    Counts are kept in RUN/counts by step, so counting again, or up to another step, is a look-up,
    and a run that trained on is counted on from there.

    Examples:

      castalia count runs/demo --terms words.txt

      castalia count runs/demo --terms words.txt --steps 0:100 --at 10,50 --json

      castalia count runs/demo --regex "[0-9]+" --pairs-within 3 --top 10

      castalia count runs/demo --ngrams 2 --words --top 50
    """
    from castalia.core.files import atomic_write
    from castalia.stream.counting.tables import as_text, json_of, most_first
    from castalia.stream.opening import open_stream

    asked = what.asked(found)
    counts = counted(open_stream(config, note), asked, steps, top, jobs)
    # Terms alone stay in the order of their file; n-grams come in their own order, in which equal
    # counts follow the keys.
    shown = list(range(len(counts.labels)))
    by_file = what.terms is not None and what.pairs_within is None and top is None
    if not by_file and what.ngrams is None:
        shown = most_first(counts)[:top]
    record = json.dumps(json_of(counts, shown), ensure_ascii=False)
    if output is not None:
        with atomic_write(output) as file:
            file.write(record + "\n")
    if as_json:
        typer.echo(record)
    elif output is None:
        if what.terms is None and top is None:
            shown = shown[:SHOWN]
        typer.echo(as_text(counts, shown))


def counted(
    stream: "Stream",
    asked: "Asked | Ngrams",
    steps: StepFlags,
    top: int | None,
    jobs: int | None,
) -> "Counts":
    """Count what is asked in the chosen steps, with a bar on a terminal."""
    from castalia.stream.counting.counting import count, count_ngrams, default_jobs
    from castalia.stream.counting.ngrams import Ngrams
    from castalia.stream.viewing import parse_steps
    from castalia.terminal.progress import bytes_progress

    chosen: dict[str, Any] = {"at": steps.checkpoints(), "jobs": jobs or default_jobs()}
    if steps.steps is not None:
        wanted = parse_steps(steps.steps, stream.sizes, stream.steps)
        chosen |= {"first": wanted.first, "stop": wanted.stop}
    with bytes_progress("count", [], None) as advance:
        if advance is not None:
            # Two bytes a token, as most token files have.
            chosen["on_part"] = lambda steps, tokens: advance(2 * tokens)
        if isinstance(asked, Ngrams):
            return count_ngrams(stream, asked, top=top or MOST_NGRAMS, **chosen)
        return count(stream, asked, **chosen)
