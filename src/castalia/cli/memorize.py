"""`castalia memorize`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import AsJson, grouped, note, panel

if TYPE_CHECKING:
    from castalia.memorization.job import Job

ROWS = panel("Rows")
ENGINE = panel("Engine")
MEASURED = panel("What is measured")


@dataclass(frozen=True)
class RowFlags:
    """Which rows are scored."""

    rows: Annotated[
        str | None,
        ROWS(metavar="A:B", help="Places A to B - 1 in the run's order; by default all."),
    ] = None
    sample: Annotated[
        int | None,
        ROWS(metavar="N", min=1, help="Draw so many of them, the same for all checkpoints."),
    ] = None
    seed: Annotated[int, ROWS(metavar="N", min=0, help="Of the draw.")] = 0
    stream: Annotated[
        list[str] | None,
        ROWS(
            metavar="RUN",
            help="The run, preset, YAML or a.b=c whose rows they are, for models without a run;"
            " may be repeated.",
        ),
    ] = None


@dataclass(frozen=True)
class MeasureFlags:
    """What is computed of each row."""

    prompt: Annotated[int, MEASURED(metavar="N", min=1, help="Tokens that the model is given.")] = (
        32
    )
    continuation: Annotated[
        int, MEASURED(metavar="N", min=1, help="Tokens that it makes, which are compared.")
    ] = 32
    score: Annotated[
        bool,
        MEASURED(help="The share of equal tokens; without it, only whether all are equal."),
    ] = True
    loss: Annotated[bool, MEASURED(help="The loss of the row's own continuation.")] = True


@dataclass(frozen=True)
class HowFlags:
    """Which arithmetic computes it."""

    engine: Annotated[
        str, ENGINE(help="auto, native, torch or another; auto is the fastest in fp32.")
    ] = "auto"
    dtype: Annotated[str | None, ENGINE(help="Of the weights; by default fp32.")] = None
    device: Annotated[str, ENGINE(help="auto, cpu or cuda.")] = "auto"


@grouped
def memorize(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, RUN/step1000, OWNER/NAME of the Hugging Face hub, folders of revisions, or"
            " folders of these.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(metavar="FILE", help="FILE.parquet; of several models a folder."),
    ],
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            "--checkpoints",
            metavar="STEPS",
            help="all, last, 0,1,1000 or 1000:5000 (both included); by default the newest.",
        ),
    ] = None,
    rows: RowFlags = RowFlags(),
    measured: MeasureFlags = MeasureFlags(),
    how: HowFlags = HowFlags(),
    jobs: Annotated[
        int, ENGINE(metavar="N", min=1, help="Processes that share the work and the cores.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Score how far checkpoints reproduce the rows that they were trained on.

    A checkpoint reads the first --prompt tokens of each row of its past steps, and continues them
    greedily. The score is the share of --continuation tokens equal to the row's; `exact` means all
    of them. FILE has the columns step (of the checkpoint), row (within its training step), index
    (place in the run's order), prompt, continuation, score, exact, loss (nats a token).

    The same command again continues a scan that was stopped, adds checkpoints to a finished one,
    and joins one that runs: any number of processes share the work.

    Examples:

      castalia memorize runs/debug --steps all --output memorized.parquet

      castalia memorize runs/a runs/b --steps 1000 --sample 100000 --output scans

      castalia memorize EleutherAI/pythia-70m --stream runs/rows --output 70.parquet
    """
    from castalia.memorization.job import Options, jobs_of
    from castalia.terminal.signals import stoppable

    asked = asdict(rows)
    stream = asked.pop("stream")
    options = Options(**asked, **asdict(measured), **asdict(how))
    scans = jobs_of(paths, steps, options, output, stream)
    with stoppable("the same command continues the scan"):
        results = list(finished(scans, jobs, as_json))
    if as_json:
        echo_on_first(json.dumps(results))


def finished(scans: "Sequence[Job]", processes: int, as_json: bool) -> Iterator[dict[str, Any]]:
    """Run the scans; each checkpoint's numbers, printed as they come unless as JSON."""
    from castalia.memorization.scan import scan

    for job in scans:
        for summary in scan(job, processes, note):
            line = {"model": job.name, "output": str(job.output), **summary._asdict()}
            if not as_json:
                echo_on_first(text_of(line))
            yield line


def echo_on_first(text: str) -> None:
    """Print on rank 0: every rank of a launcher has all results."""
    from castalia.core.ranks import environment

    if environment()[0] == 0:
        typer.echo(text)


def text_of(line: dict[str, object]) -> str:
    """A checkpoint's numbers on the screen."""
    words = [f"{line['model']} step {line['step']}: {line['exact']} of {line['rows']} rows exact"]
    for name in ("score", "loss"):
        if line[name] is not None:
            words.append(f"mean {name} {line[name]:.4f}")
    if line["near_ties"]:
        words.append(f"{line['near_ties']} rows with a near tie")
    return ", ".join(words)
