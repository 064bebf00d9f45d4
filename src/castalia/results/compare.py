"""Two selections of results side by side, and what keeps their numbers from being compared."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from castalia.core.errors import ConfigError, DataError, nearest
from castalia.core.extras import require
from castalia.results.formats import counted
from castalia.results.query import EXTRA, PURPOSE, Answer
from castalia.results.schema import CONDITIONS
from castalia.results.selections import Selection

ALL = "all"
SUBJECT = ("model", "variant", "seed", "step")
"""Columns that are joined where a selection has several of their values."""
NUMBER = ("task", "metric", "filter")
"""Columns that are always joined."""
CERTAIN = 2.0
"""Standard errors from which a difference is counted."""


class Comparison(NamedTuple):
    """The numbers of two selections that compare."""

    answer: Answer
    """One row a number: what it is; a, b, difference = b - a, its standard error, z."""
    better: tuple[int, int]
    """Numbers that are better in a, and in b, where the metric has a direction."""
    certain: int
    """Differences of more than two standard errors."""
    alone: tuple[int, int]
    """Numbers that only a, or only b has."""

    def summary(self, names: tuple[str, str]) -> str:
        """A sentence about it."""
        a, b = names
        return (
            f"{counted(len(self.answer[1]), 'number')}: {a} is better in {self.better[0]}, {b} in"
            f" {self.better[1]}; {self.certain} differ by more than {CERTAIN:.0f} standard errors;"
            f" {self.alone[0]} only in {a}, {self.alone[1]} only in {b}"
        )


def allowed_conditions(text: str | None) -> tuple[str, ...]:
    """The conditions in `harness,dtype` or `all`.

    Raises  ConfigError for an unknown one, with the nearest.
    """
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if ALL in words:
        return CONDITIONS
    for word in words:
        if word not in CONDITIONS:
            raise ConfigError(
                f"--across {word}: unknown condition{nearest(word, CONDITIONS)}; choose from"
                f" {', '.join(CONDITIONS)}, or {ALL}"
            )
    return tuple(words)


def compare(a: Selection, b: Selection, across: Collection[str] = ()) -> Comparison:
    """Compare the numbers of the same task, metric and filter; and of the same model, variant,
    seed and step where either selection has several.

    Of several numbers of one task those under equal conditions are compared.
    across  the CONDITIONS that may differ. Unknown and known differ; unknown and unknown do not.
    Raises  DataError if numbers were measured under different conditions, or nothing matches.
    """
    duckdb = require("duckdb", EXTRA, PURPOSE)
    with duckdb.connect() as connection:
        connection.register("rows_a", a.table)
        connection.register("rows_b", b.table)
        joined = joined_columns(connection, a, b)
        connection.execute(f"CREATE TEMP TABLE pairs AS {pairs_sql(joined, across)}")
        refuse_other_conditions(connection, a, b, across)
        if not rows_of(connection, "SELECT 1 FROM pairs LIMIT 1"):
            raise DataError(f"{a.name} and {b.name} have no task and metric in common")
        return comparison(connection, joined)


def joined_columns(connection: Any, a: Selection, b: Selection) -> tuple[str, ...]:
    """The columns of SUBJECT by which rows are matched.

    Raises  DataError if a column would match no row.
    """
    joined = []
    for column in SUBJECT:
        values = [
            {row[0] for row in rows_of(connection, f"SELECT DISTINCT {column} FROM {rows}")}
            for rows in ("rows_a", "rows_b")
        ]
        if len(values[0]) == 1 and len(values[1]) == 1:
            continue
        if not values[0] & values[1]:
            remedy = {"model": "SUITE/MODEL", "step": "NAME@STEP"}.get(
                column, f"NAME,{column}=VALUE"
            )
            raise DataError(
                f"{a.name} has {described(column, values[0])} and {b.name}"
                f" {described(column, values[1])}; choose one of each: {remedy}"
            )
        joined.append(column)
    return tuple(joined)


def described(column: str, values: set[Any]) -> str:
    """The values of a column in words."""
    if values == {None}:
        return f"no {column}"
    shown = [str(value) for value in sorted(value for value in values if value is not None)]
    if len(shown) == 1:
        return f"the {column} {shown[0]}"
    # Five show what is meant; a suite has 154 steps.
    if len(shown) > 5:
        shown = [*shown[:5], "…"]
    return f"the {column}s {', '.join(shown)}"


def pairs_sql(joined: Sequence[str], across: Collection[str]) -> str:
    """SQL of the pairs: for each number those with the fewest differences that are not allowed,
    then the fewest."""
    keys = (*NUMBER, *joined)
    match = " AND ".join(f"a.{key} IS NOT DISTINCT FROM b.{key}" for key in keys)
    differ = {name: f"(a.{name} IS DISTINCT FROM b.{name})::INT" for name in CONDITIONS}
    refused = " + ".join(sql for name, sql in differ.items() if name not in across) or "0"
    columns = [f"a.{key}" for key in keys]
    for name in CONDITIONS:
        columns += [f"a.{name} AS {name}_a", f"b.{name} AS {name}_b"]
    return f"""
        SELECT {", ".join(columns)}, a.value AS a, b.value AS b, a.stderr AS stderr_a,
               b.stderr AS stderr_b, coalesce(a.higher_is_better, b.higher_is_better) AS higher,
               {refused} AS refused, {" + ".join(differ.values())} AS different
        FROM rows_a a JOIN rows_b b ON {match}
        QUALIFY rank() OVER (
            PARTITION BY {", ".join(f"a.{key}" for key in keys)} ORDER BY refused, different
        ) = 1
    """


def refuse_other_conditions(
    connection: Any, a: Selection, b: Selection, across: Collection[str]
) -> None:
    """Refuse pairs that differ in more than is allowed.

    Raises  DataError with the conditions, their values, and the option that allows it.
    """
    lines = []
    names = []
    for name in CONDITIONS:
        if name in across:
            continue
        rows = rows_of(
            connection,
            f"SELECT {name}_a, {name}_b, count(*) FROM pairs WHERE refused > 0 AND"
            f" {name}_a IS DISTINCT FROM {name}_b GROUP BY ALL ORDER BY 3 DESC",
        )
        if not rows:
            continue
        names.append(name)
        # The rows are sorted by their count: the first pair of values is the most frequent.
        value_a, value_b, count = rows[0]
        numbers = counted(count, "number")
        if len(rows) > 1:
            numbers += f", and {len(rows) - 1} other pairs of values"
        lines.append(f"  {name}: {known(value_a)} against {known(value_b)} ({numbers})")
    if lines:
        raise DataError(
            "\n".join(
                [
                    f"{a.name} and {b.name} were not measured under the same conditions:",
                    *lines,
                    f"--across {','.join([*across, *names])} compares them nevertheless",
                ]
            )
        )


def comparison(connection: Any, joined: Sequence[str]) -> Comparison:
    """The table and the counts of the pairs."""
    shown = ["task", "metric"]
    if rows_of(connection, "SELECT 1 FROM pairs WHERE filter != 'none' LIMIT 1"):
        shown.append("filter")
    shown += joined
    for name in CONDITIONS:
        differs = f"SELECT 1 FROM pairs WHERE {name}_a IS DISTINCT FROM {name}_b LIMIT 1"
        if rows_of(connection, differs):
            shown += [f"{name}_a", f"{name}_b"]
        elif name == "shots":
            shown.append("shots_a AS shots")
    error = "sqrt(stderr_a * stderr_a + stderr_b * stderr_b)"
    columns = f"a, b, b - a AS difference, {error} AS stderr, (b - a) / nullif({error}, 0) AS z"
    answer = connection.execute(
        f"SELECT {', '.join(shown)}, {columns} FROM pairs ORDER BY {', '.join(NUMBER)}"
        f"{''.join(f', {name}' for name in joined)}, shots_a, shots_b"
    )
    names = [column[0] for column in answer.description]
    rows = answer.fetchall()
    ((better_a, better_b, certain),) = rows_of(
        connection,
        # In SQL a NaN is above all numbers; here it is neither better nor worse.
        "SELECT count(*) FILTER (higher = (a > b) AND a != b),"
        " count(*) FILTER (higher = (b > a) AND a != b),"
        f" count(*) FILTER (abs(b - a) > {CERTAIN} * {error})"
        " FROM pairs WHERE NOT isnan(a) AND NOT isnan(b)",
    )
    alone = (count_alone(connection, "a", joined), count_alone(connection, "b", joined))
    return Comparison((names, rows), (better_a, better_b), certain, alone)


def count_alone(connection: Any, side: str, joined: Sequence[str]) -> int:
    """Numbers of a side that no number of the other matches."""
    keys = (*NUMBER, *joined)
    match = " AND ".join(f"r.{key} IS NOT DISTINCT FROM pairs.{key}" for key in keys)
    distinct = ", ".join(keys)
    sql = (
        f"SELECT count(*) FROM (SELECT DISTINCT {distinct} FROM rows_{side}) r"
        f" ANTI JOIN pairs ON {match}"
    )
    return int(rows_of(connection, sql)[0][0])


def rows_of(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    """The rows that a query gives."""
    rows: list[tuple[Any, ...]] = connection.execute(sql).fetchall()
    return rows


def known(value: Any) -> str:
    """A value in an error."""
    if value is None:
        return "unknown"
    return str(value)
