"""`castalia eval`."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.terminal.flags import ENGINE, AsJson, EngineFlags, grouped, panel

if TYPE_CHECKING:
    from castalia.eval.jobs import JobOptions
    from castalia.eval.places import Checkpoint
    from castalia.eval.sweeps import Outcome
    from castalia.eval.work import WorkOptions

TASKS = panel("Tasks")
TEXT = panel("Held-out text")
OUTPUT = panel("Output")
SWEEP = panel("Sweep")
ENGINE_WORDS = ("engine", "dtype", "cache", "device")
"""Options that may stand as words after the paths, as they do in Python."""
BATCH = 16
BOOTSTRAP = 100_000


@dataclass(frozen=True)
class TaskFlags:
    """What is measured."""

    tasks: Annotated[
        list[str] | None,
        TASKS(
            metavar="A,B",
            help="Tasks, groups or patterns of lm-evaluation-harness, paths of task YAMLs, and"
            " bits_per_byte for held-out text; by default those of the run's config (eval.tasks).",
        ),
    ] = None
    include: Annotated[
        list[str] | None, TASKS(metavar="DIR", help="Folder of more task YAMLs; may be repeated.")
    ] = None
    shots: Annotated[
        str | None,
        TASKS(metavar="0,5", help="Examples before each question; by default each task's own."),
    ] = None
    limit: Annotated[
        float | None,
        TASKS(metavar="N", help="Documents of each task, at most; below 1, a share of them."),
    ] = None
    batch: Annotated[
        int | None,
        TASKS(metavar="N", min=1, help="Rows in a forward pass.", show_default=str(BATCH)),
    ] = None
    bootstrap: Annotated[
        int | None,
        TASKS(
            metavar="N",
            min=0,
            help="Resamples for errors without a formula.",
            show_default=str(BOOTSTRAP),
        ),
    ] = None


@dataclass(frozen=True)
class TextFlags:
    """Held-out text, for the task bits_per_byte."""

    held_out: Annotated[
        list[str] | None,
        TEXT(
            metavar="NAME=PREFIX",
            help="Token files of a source; by default data.valid of each run.",
        ),
    ] = None
    held_out_tokens: Annotated[
        int | None,
        TEXT(metavar="N", min=1, help="Tokens of each source, in whole documents, at most."),
    ] = None
    window: Annotated[
        int | None,
        TEXT(
            metavar="N",
            min=1,
            help="Tokens in a window; by default data.seq_length, else the model's limit.",
        ),
    ] = None

    def sources(self) -> dict[str, str]:
        """Prefixes by name.

        Raises  ConfigError.
        """
        from castalia.core.errors import ConfigError

        sources: dict[str, str] = {}
        for word in self.held_out or []:
            name, equals, prefix = word.partition("=")
            if not (name and equals and prefix):
                raise ConfigError(
                    f"--held-out {word}: expected NAME=PREFIX, such as code=data/valid/code"
                )
            sources[name] = prefix.removesuffix(".bin").removesuffix(".idx")
        return sources


@dataclass(frozen=True)
class OutputFlags:
    """Where the numbers go besides the table on the screen."""

    store: Annotated[
        str | None,
        OUTPUT(
            metavar="DIR",
            help="Folder of the results table; by default RUN/evals, SUITE/evals or evals.",
        ),
    ] = None
    output: Annotated[
        str | None,
        OUTPUT(
            metavar="FILE",
            help="Write the harness's own JSON; of several checkpoints a file each.",
        ),
    ] = None
    samples: Annotated[
        bool,
        OUTPUT("--samples", help="Write each document with its answers, in `samples` beside it."),
    ] = False
    as_json: AsJson = False


@dataclass(frozen=True)
class SweepFlags:
    """How many checkpoints are measured."""

    steps: Annotated[
        str | None,
        SWEEP(
            metavar="STEPS",
            help="all, last, 0,1,1000 or 1000:5000 (both included) of each run or model; by default"
            " the newest.",
        ),
    ] = None
    jobs: Annotated[
        int, SWEEP(metavar="N", min=1, help="Processes; each takes whole checkpoints.")
    ] = 1
    again: Annotated[
        bool, SWEEP("--again", help="Measure also what stands in the results table.")
    ] = False
    reference: Annotated[
        bool,
        SWEEP(help="With another engine or dtype, measure torch in fp32, too, and compare."),
    ] = True


@grouped
def eval_(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT|RUN|SUITE... [dtype=int8 ...]",
            help="Runs, RUN/step1000, Hugging Face folders, OWNER/NAME of its hub, exports,"
            " GPT-NeoX checkpoints, GGUF files, or folders of these; then options of the engine.",
        ),
    ],
    tasks: TaskFlags = TaskFlags(),
    text: TextFlags = TextFlags(),
    sweep: SweepFlags = SweepFlags(),
    running: EngineFlags = EngineFlags(),
    device: Annotated[str, ENGINE(help="auto, cpu or cuda.")] = "auto",
    output: OutputFlags = OutputFlags(),
) -> None:
    """Measure checkpoints on tasks of lm-evaluation-harness and on held-out text.

    Numbers go into a results table, which `castalia results` and `castalia report` read. The same
    command again measures what the table lacks, so that it continues a sweep that was stopped.

    Examples:

      castalia eval runs/demo --tasks lambada_openai,piqa

      castalia eval runs/demo --tasks bits_per_byte --steps all

      castalia eval runs --tasks my/wino.yaml --shots 0,5 --steps 1000:5000 --jobs 4

      castalia eval runs/demo engine=native dtype=int8 --tasks lambada_openai
    """
    from castalia.core.errors import ConfigError
    from castalia.eval.launched import launched
    from castalia.eval.places import checkpoints_of
    from castalia.eval.sweeps import sweep as run_sweep
    from castalia.terminal.signals import stoppable

    places, how = split_words(paths, running, device)
    checkpoints = checkpoints_of(places, sweep.steps, output.store)
    asked, prefix = work_options(checkpoints, tasks, text, output.samples)
    options = job_options(how, sweep)
    with launched() as share, stoppable("the same command continues the sweep"):
        if share.size > 1 and sweep.jobs > 1:
            raise ConfigError("--jobs does not go with a launcher, whose ranks share the work")
        # What the functions of a task print is no part of the table or the JSON.
        with redirect_stdout(sys.stderr):
            outcomes = run_sweep(
                checkpoints,
                asked,
                options,
                processes=sweep.jobs,
                share=share,
                say=say_on_first if share.rank == 0 else say_nothing,
            )
        if share.rank == 0:
            show(outcomes, output, prefix)
    raise_failures(outcomes)


def say_on_first(text: str) -> None:
    """A line about the progress; standard output is for the numbers."""
    typer.echo(text, err=True)


def say_nothing(text: str) -> None:
    """On ranks whose output would only repeat that of the first."""


def split_words(
    words: Sequence[str], running: EngineFlags, device: str
) -> tuple[list[str], dict[str, Any]]:
    """The paths, and the options of `castalia.load` by flags and by words; words win.

    Raises  ConfigError for an unknown option, or no path.
    """
    from dataclasses import asdict

    from castalia.core.errors import ConfigError, nearest

    how: dict[str, Any] = asdict(running) | {"device": device}
    paths: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            paths.append(word)
        elif name not in ENGINE_WORDS:
            raise ConfigError(
                f"{word}: no such path, and no option of the engine"
                f"{nearest(name, ENGINE_WORDS)}; those are {', '.join(ENGINE_WORDS)}"
            )
        else:
            how[name] = value
    if not paths:
        raise ConfigError("castalia eval needs a run, a checkpoint or a suite")
    return paths, how


def job_options(how: Mapping[str, Any], flags: SweepFlags) -> "JobOptions":
    """How checkpoints are computed.

    Raises  ConfigError for an unknown engine.
    """
    from castalia.core.errors import ConfigError, nearest
    from castalia.eval.jobs import JobOptions
    from castalia.eval.labels import Arithmetic
    from castalia.eval.launched import device_of_rank
    from castalia.inference.engines import ENGINES

    engines = ["auto", *ENGINES]
    if how["engine"] not in engines:
        raise ConfigError(
            f"unknown engine {how['engine']!r}; choose one of {', '.join(engines)}"
            f"{nearest(how['engine'], engines)}"
        )
    arithmetic = Arithmetic(**how)._replace(device=device_of_rank(how["device"]))
    return JobOptions(arithmetic, again=flags.again, compares=flags.reference)


def work_options(
    checkpoints: "Sequence[Checkpoint]", flags: TaskFlags, text: TextFlags, samples: bool
) -> "tuple[WorkOptions, str | None]":
    """What is measured, by the flags and, without --tasks, the config of the runs; and the prefix
    of GPT-NeoX's results file.

    Raises  ConfigError.
    """
    from castalia.core.errors import ConfigError
    from castalia.eval.held_out import Windows
    from castalia.eval.work import WorkOptions

    section: Mapping[str, Any] = {}
    names = split(flags.tasks)
    if not names:
        section = section_of(checkpoints)
        names = tuple(section["tasks"])
    shots: tuple[int | None, ...] = (section.get("shots"),)
    if flags.shots is not None:
        shots = parse_shots(flags.shots)

    def setting(name: str, usual: Any) -> Any:
        # An option, else the config's, else the default.
        given = getattr(flags, name)
        return section.get(name, usual) if given is None else given

    limit = setting("limit", None)
    # NaN is not above 0, and infinity no whole number.
    if limit is not None and not (0 < limit < 1 or limit % 1 == 0 < limit):
        raise ConfigError(
            f"--limit {limit:g}: expected a whole number of documents, or a share below 1"
        )
    asked = WorkOptions(
        tasks=names,
        include=(*(flags.include or ()), *section.get("include", ())),
        shots=shots,
        limit=limit,
        batch=setting("batch", BATCH),
        bootstrap=setting("bootstrap", BOOTSTRAP),
        held_out=text.sources(),
        windows=Windows(text.window, text.held_out_tokens),
        samples=samples,
    )
    return asked, section.get("results_prefix")


def split(words: Sequence[str] | None) -> tuple[str, ...]:
    """Names between commas, of an option that may be repeated."""
    return tuple(name.strip() for word in words or () for name in word.split(",") if name.strip())


def parse_shots(text: str) -> tuple[int, ...]:
    """`0,5` as numbers.

    Raises  ConfigError.
    """
    from castalia.core.errors import ConfigError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--shots {text!r}: expected numbers between commas, such as 0,5")
    return tuple(int(word) for word in words)


def section_of(checkpoints: "Sequence[Checkpoint]") -> Mapping[str, Any]:
    """The section `eval` of the config that the checkpoints' runs share.

    Raises  ConfigError if they name no tasks, or different ones.
    """
    from castalia.core.errors import ConfigError
    from castalia.eval.settings import eval_section

    how = (
        "give --tasks NAME,… with tasks of lm-evaluation-harness, such as lambada_openai, piqa,"
        " arc_easy or sciq, a YAML file of a task, or bits_per_byte for the run's held-out text; or"
        " set eval.tasks in the run's config"
    )
    runs = {checkpoint.run for checkpoint in checkpoints}
    sections = [eval_section(run) for run in runs if run is not None]
    if None in runs:
        raise ConfigError(f"no tasks: a model without a run has no config that names them; {how}")
    if any(section != sections[0] for section in sections):
        raise ConfigError(f"no tasks: the configs of the runs differ in their section eval; {how}")
    if not sections[0].get("tasks"):
        (first, *_) = sorted(str(run) for run in runs)
        raise ConfigError(f"no tasks: eval.tasks is empty in the config of {first}; {how}")
    return sections[0]


def show(outcomes: "Sequence[Outcome]", flags: OutputFlags, prefix: str | None) -> None:
    """Print the numbers, and write the files that are asked for."""
    from castalia.cli.eval_table import print_effects, print_table
    from castalia.core.files import write_json
    from castalia.eval.harness_json import documents_of, file_of, write_neox_file
    from castalia.results.formats import as_json
    from castalia.results.schema import COLUMNS

    written: list[Path] = []
    for document in documents_of(outcomes):
        if flags.output is not None:
            path = file_of(flags.output, document)
            write_json(path, document.content)
            written.append(path)
        if prefix is not None:
            written.append(write_neox_file(prefix, document.content))
    for path in written:
        typer.echo(f"written: {path}", err=True)
    if flags.as_json:
        rows = [row for outcome in outcomes for row in (*outcome.rows, *outcome.reference)]
        # Perplexities of an untrained model are infinite, for which JSON has no number.
        typer.echo(
            as_json(tuple(COLUMNS), [[getattr(row, c) for c in COLUMNS] for row in rows]), nl=False
        )
        return
    print_table(outcomes)
    print_effects(outcomes)


def raise_failures(outcomes: "Sequence[Outcome]") -> None:
    """Raises  CastaliaError that lists what failed, if anything did."""
    from castalia.core.errors import CastaliaError

    failed = [outcome for outcome in outcomes if outcome.failures]
    if not failed:
        return
    lines = []
    for outcome in failed:
        for failure in outcome.failures:
            task = "" if failure.task is None else f", task {failure.task}"
            lines.append(f"{outcome.checkpoint.path}{task}: {failure.reason}")
    # Of one checkpoint the sentences themselves, and their exit status.
    if len(outcomes) == 1:
        error = CastaliaError("\n  ".join(lines))
        error.exit_code = failed[0].failures[0].exit_code
        raise error
    count = f"{len(failed)} of {len(outcomes)} checkpoints failed"
    others = "" if len(failed) == len(outcomes) else "; the others are in the table"
    raise CastaliaError(f"{count}{others}:\n  " + "\n  ".join(lines))
