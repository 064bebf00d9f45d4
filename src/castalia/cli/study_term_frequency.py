"""`castalia study term-frequency`: accuracy against how often numbers were read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from castalia.cli.study import app
from castalia.terminal.flags import AsJson, grouped, note, panel

ASKED = panel("Questions")
MEASURED = panel("What is measured")


@dataclass(frozen=True)
class QuestionFlags:
    """How questions are asked."""

    template: Annotated[
        str | None,
        ASKED(metavar="TEXT", help="A statement with {x1}, {op}, {x2} and, behind them, {answer}."),
    ] = None
    between: Annotated[
        str, ASKED(metavar="TEXT", help=r"Between examples; \n is a line break.")
    ] = r"\n\n"
    operands: Annotated[
        str, ASKED(metavar="A:B", help="First operands, whose frequency is studied: A to B - 1.")
    ] = "0:100"
    seconds: Annotated[str, ASKED(metavar="A:B", help="Second operands.")] = "1:51"
    tasks: Annotated[str, ASKED(metavar="LIST", help="multiplication, addition or both.")] = (
        "multiplication,addition"
    )
    shots: Annotated[str, ASKED(metavar="LIST", help="Examples before a question.")] = "0,2,4,8,16"
    new_tokens: Annotated[int, ASKED(metavar="N", min=1, help="Longest answer.")] = 16
    seed: Annotated[int, ASKED(metavar="N", help="Of the choice of examples.")] = 0


@app.command("term-frequency")
@grouped
def term_frequency(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|SUITE|CSV...",
            help="Runs, suites, or CSV files of the published study or an earlier one.",
        ),
    ],
    output: Annotated[
        str, typer.Option(metavar="FOLDER", help="Tables, pictures and the page go there.")
    ],
    questions: QuestionFlags,
    checkpoints: Annotated[
        str,
        MEASURED(metavar="STEPS", help="all, last, steps between commas, or a range 100:400."),
    ] = "all",
    frequency: Annotated[
        str,
        MEASURED(
            metavar="HOW",
            help="alone: a number counts wherever it stands as a word; windows: with another number"
            " 1 to 3 words away, as published.",
        ),
    ] = "alone",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that count; by default one a core.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether a model calculates better with numbers that it has read more often.

    Counts each first operand in what the run had read before each checkpoint, asks the checkpoint
    sums and products by greedy decoding, and writes accuracy against frequency: index.html, SVG
    pictures, accuracy.csv, table.json, table.csv, table.md. The same command continues a study that
    was stopped.

    Examples:

      castalia study term-frequency runs/pythia-70m --output studies/numbers

      castalia study term-frequency runs/mini --operands 1:21 --output study
    """
    from castalia.stream.counting.counting import default_jobs
    from castalia.studies.term_frequency import study_of_words
    from castalia.studies.term_frequency import term_frequency as run_study

    study = study_of_words(**asdict(questions), checkpoints=checkpoints, frequency=frequency)
    record = run_study(paths, study, Path(output), jobs=jobs or default_jobs(), say=note)
    typer.echo(json.dumps(record) if as_json else f"{output}/index.html")
