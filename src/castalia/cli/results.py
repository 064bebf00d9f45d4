"""`castalia results`."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.terminal.flags import AsJson, grouped, panel

if TYPE_CHECKING:
    from castalia.results.query import Answer

EVALS = "evals"
"""As `castalia.results.EVALS`, which loads more than `--help` may wait for."""
MOST_ROWS = 1000
"""Rows that are printed as aligned columns."""
OVERVIEW = """
SELECT suite, model, variant, count(DISTINCT seed) AS seeds, count(DISTINCT step) AS steps,
       min(step) AS first, max(step) AS last, count(DISTINCT task) AS tasks, count(*) AS numbers
FROM results GROUP BY ALL ORDER BY suite, any_value(parameters), model, variant
"""
SHORT = (
    "suite, model, variant, seed, step, task, metric, filter, shots, value, stderr, documents,"
    " harness, dtype, engine"
)
ORDER = "suite, parameters, model, variant, seed, step, task, metric, filter, shots"

QUESTION = panel("Question")
OUTPUT = panel("Output")


@dataclass(frozen=True)
class TextFlags:
    """How rows are printed."""

    as_csv: Annotated[bool, OUTPUT("--csv", help="Print CSV; floats have all their digits.")] = (
        False
    )
    as_markdown: Annotated[bool, OUTPUT("--markdown", help="Print a Markdown table.")] = False
    as_json: AsJson = False

    def show(self, answer: "Answer") -> None:
        """Print rows as the options say.

        Raises  ConfigError if several say it.
        """
        from castalia.core.errors import ConfigError
        from castalia.results.formats import as_columns, as_csv, as_json, as_markdown

        if self.as_csv + self.as_markdown + self.as_json > 1:
            raise ConfigError("give one of --csv, --markdown and --json")
        names, rows = answer
        if self.as_csv:
            typer.echo(as_csv(names, rows), nl=False)
        elif self.as_markdown:
            typer.echo(as_markdown(names, rows), nl=False)
        elif self.as_json:
            typer.echo(as_json(names, rows), nl=False)
        else:
            typer.echo(as_columns(names, rows[:MOST_ROWS]), nl=False)
            if len(rows) > MOST_ROWS:
                typer.echo(f"{len(rows) - MOST_ROWS} more rows; --csv prints all", err=True)


@dataclass(frozen=True)
class QuestionFlags:
    """What is asked."""

    sql: Annotated[
        str | None, QUESTION(metavar="SELECT", help="SQL of DuckDB over the table `results`.")
    ] = None
    where: Annotated[
        str | None, QUESTION(metavar="CONDITION", help="The numbers for which this SQL holds.")
    ] = None

    compare: Annotated[
        tuple[str, str] | None,
        QUESTION(
            metavar="A B",
            help="Two selections side by side. Each is SUITE, MODEL, SUITE/MODEL, a run or a store,"
            " with @STEP or @last and ,COLUMN=VALUE behind it.",
        ),
    ] = None
    across: Annotated[
        str | None,
        QUESTION(
            metavar="CONDITIONS",
            help="With --compare, conditions that may differ: harness, task_version, task_hash,"
            " dtype, engine, shots, documents, or all.",
        ),
    ] = None

    def asked(self) -> bool:
        """Whether anything is asked.

        Raises  ConfigError if several things are.
        """
        from castalia.core.errors import ConfigError

        if self.sql is not None and (self.where is not None or self.compare is not None):
            raise ConfigError("--sql stands alone: without --where and --compare")
        if self.across is not None and self.compare is None:
            raise ConfigError("--across needs --compare A B")
        return any(each is not None for each in (self.sql, self.where, self.compare))

    def answer(self, places: list[str]) -> "Answer":
        """What the stores at `places` answer; an overview of them if nothing is asked."""
        from castalia.results import find_stores, query_stores

        stores = [store for place in places for store in find_stores(place)]
        if self.where is not None:
            # On a line of its own: a comment in the condition ends there.
            condition = f"(\n{self.where}\n)"
            sql = f"SELECT {SHORT} FROM results WHERE {condition} ORDER BY {ORDER}"
            return query_stores(stores, sql)
        return query_stores(stores, OVERVIEW if self.sql is None else self.sql)

    def comparison(self, names: tuple[str, str], places: list[str]) -> "Answer":
        """The two selections side by side; what they come to is said on stderr."""
        from castalia.results import find_stores
        from castalia.results.compare import allowed_conditions, compare
        from castalia.results.selections import select_rows

        across = allowed_conditions(self.across)
        # Runs and stores may be compared where there is no store of the folder.
        usual_is_missing = places == [EVALS] and not os.path.exists(EVALS)
        stores = (
            [] if usual_is_missing else [each for place in places for each in find_stores(place)]
        )
        a, b = (select_rows(name, stores, self.where) for name in names)
        done = compare(a, b, across)
        typer.echo(done.summary(names), err=True)
        return done.answer


@grouped
def results(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH...]",
            help="With --import, more files to import; else stores to read, like --store.",
        ),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="PATH",
            help="Add published results: files (.json, .csv) or folders, which are searched.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the table, a run or a suite with results, or a .parquet file.",
            show_default=EVALS,
        ),
    ] = None,
    question: QuestionFlags = QuestionFlags(),
    text: TextFlags = TextFlags(),
) -> None:
    """Import, query and compare the results of evaluations.

    One table holds all numbers: suite, model, variant, size, parameters, seed, step, last_step,
    tokens, task, metric, filter, shots, value, stderr, documents, higher_is_better, harness,
    task_version, task_hash, dtype, engine, batch, seconds, evaluated_at, checkpoint, source.
    Without --sql and --where, the models in it are listed.

    Examples:

      castalia results --import downloads/evals --store evals

      castalia results --sql "select step, value from results limit 9" --csv

      castalia results --where "task = 'piqa' and step > 1000" --markdown

      castalia results --compare pythia-v1/pythia-70m@143000 opt/opt-125m
    """
    asked = question.asked()
    problems = []
    if imports:
        problems = import_files([*imports, *(paths or [])], store or EVALS, quiet=asked)
    if asked or not imports:
        places = ([store] if store else None) or (None if imports else paths) or [EVALS]
        if question.compare is None:
            text.show(question.answer(places))
        else:
            text.show(question.comparison(question.compare, places))
    if problems:
        from castalia.core.errors import DataError

        raise DataError("not imported:\n" + "\n".join(problems))


def import_files(paths: list[str], store: str, *, quiet: bool) -> list[str]:
    """Import and tell about it, `quiet` on stderr; returns what could not be imported."""
    from castalia.results import ResultsStore, import_results

    done = import_results(paths, ResultsStore(store))
    typer.echo("\n".join(done.lines()), err=quiet)
    return done.problems
