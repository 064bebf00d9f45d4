"""Results tables as the data of a page: a header, and a block for each task that the page unpacks
when the task is chosen."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from castalia.analysis.page_file import compressed
from castalia.analysis.panel import rounded
from castalia.analysis.score_names import ModelName, families, groups_of, size_of
from castalia.core.extras import require
from castalia.results import CONDITIONS, ResultsStore
from castalia.results.store import read_stores

ERROR_DIGITS = 3
"""Significant digits of a standard error, which is itself an estimate."""
MODEL = ("suite", "model", "variant", "seed")
"""Columns that name a model."""
SETTINGS = ("metric", "filter", *CONDITIONS)
"""Columns that tell the curves of one task and model apart."""

NUMBERED = f"""
CREATE TEMP TABLE numbered AS
SELECT *, dense_rank() OVER (ORDER BY {", ".join(MODEL)}) - 1 AS who FROM results
WHERE isfinite(value)
"""
MODELS = f"""
SELECT who, {", ".join(f"any_value({name})" for name in MODEL)}, any_value(size), max(parameters),
  max(last_step), max(step), max(tokens),
  min(tokens / step) FILTER (step > 0), max(tokens / step) FILTER (step > 0), count(*)
FROM numbered GROUP BY who ORDER BY who
"""
MEANS = """
INSERT INTO numbered BY NAME
SELECT * EXCLUDE (most, suites) FROM (
  SELECT title AS task, who, metric, filter, shots, harness, dtype, engine, step,
    avg(value) AS value, any_value(suite) AS suites,
    CASE WHEN count(stderr) = count(*) THEN sqrt(sum(stderr * stderr)) / count(*) END AS stderr,
    sum(documents)::BIGINT AS documents, any_value(higher_is_better) AS higher_is_better,
    'mean of ' || count(*) || ' tasks' AS task_version,
    max(count(*)) OVER (PARTITION BY any_value(suite), title, metric, filter, shots) AS most
  FROM numbered JOIN members ON task = member
  GROUP BY title, who, metric, filter, shots, harness, dtype, engine, step
  HAVING count(*) = count(DISTINCT task)
) WHERE task_version = 'mean of ' || most || ' tasks'
"""
"""The mean over a group. A checkpoint that lacks some of its tasks has none: it would be a mean of
other tasks. The standard error takes the tasks as fixed and their documents as drawn."""
ROWS = f"""
SELECT task, who, dense_rank() OVER (ORDER BY {", ".join(SETTINGS)}) - 1 AS how,
  coalesce(step, -1) AS step, value, stderr
FROM numbered ORDER BY task, who, how, step
"""
WAYS = f"""
SELECT DISTINCT {", ".join(SETTINGS)}, dense_rank() OVER (ORDER BY {", ".join(SETTINGS)}) AS how
FROM numbered ORDER BY how
"""


Flops = Mapping[tuple[str, str], int | None]
"""Suite and model -> FLOPs of a training token; None where the run's config does not say."""


def scores_data(
    stores: Sequence[ResultsStore], flops: Flops | None = None
) -> dict[str, Any] | None:
    """The results of some stores as JSON values for scores.js; None without a finite one.

    flops   the runs on the page, named as results tables name them.
    Raises  DataError if a file is damaged.
    """
    table = read_stores(stores)
    duckdb = require("duckdb", "results", "the results table")
    with duckdb.connect() as connection:
        connection.register("results", table)
        connection.execute(NUMBERED)
        if not connection.execute("SELECT count(*) FROM numbered").fetchall()[0][0]:
            return None
        groups = add_means(connection)
        models = models_data(connection.execute(MODELS).fetchall(), flops or {})
        ways = [list(row[:-1]) for row in connection.execute(WAYS).fetchall()]
        rows = connection.execute(ROWS).fetchnumpy()
        better = dict(
            connection.execute(
                "SELECT metric, any_value(higher_is_better) FROM numbered GROUP BY metric"
            ).fetchall()
        )
    blocks = blocks_data(rows)
    data = {
        "about": about(table.num_rows, models, blocks),
        "models": models,
        "settings": list(SETTINGS),
        "ways": ways,
        "better": better,
        "tasks": tasks_data(blocks, groups, [model["own"] for model in models]),
        **blocks,
    }
    text = json.dumps(data, separators=(",", ":"))
    # By it a page that is served live knows that there is nothing to draw anew.
    data["version"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return data


def about(count: int, models: Sequence[Any], blocks: Mapping[str, Any]) -> str:
    """How much there is, in words."""
    tasks = counted(len(blocks["blocks"]), "task")
    return f"{counted(count, 'number')} of {counted(len(models), 'model')} in {tasks} and means."


def counted(number: int, noun: str) -> str:
    """`1 model`, `1,200 models`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def add_means(connection: Any) -> dict[str, list[str]]:
    """Insert the mean of each group as a task of its own; returns the groups' tasks by title."""
    names = connection.execute("SELECT DISTINCT task FROM numbered").fetchall()
    groups = {title: tasks for title, (_, tasks) in groups_of(name for (name,) in names).items()}
    if not groups:
        return {}
    members = [(title, task) for title, tasks in groups.items() for task in tasks]
    connection.execute("CREATE TEMP TABLE members (title TEXT, member TEXT)")
    connection.executemany("INSERT INTO members VALUES (?, ?)", members)
    connection.execute(MEANS)
    return groups


def models_data(rows: Sequence[Sequence[Any]], flops: Flops) -> list[dict[str, Any]]:
    """The models, with what the axes need."""
    names = [ModelName(*row[1:7]) for row in rows]
    models: list[dict[str, Any]] = []
    for name, family, row in zip(names, families(names), rows, strict=True):
        last_step, step, tokens, least, most, count = row[7:13]
        size, order = size_of(name)
        # Where the batch grows during training, tokens are not proportional to steps.
        steady = least is not None and most - least < 0.01 * most
        run = (name.suite, name.model)
        per_token = flops.get(run)
        models.append(
            {
                "suite": name.suite,
                "model": name.model,
                "variant": name.variant,
                "seed": name.seed,
                "family": family,
                "size": size,
                "order": order,
                "parameters": name.parameters,
                "rows": count,
                "last": last_step or step,
                "tokens": tokens,
                "tokens_per_step": most if steady else None,
                "flops_per_token": per_token or 6 * (name.parameters or 0) or None,
                "counted": per_token is not None,
                "own": run in flops,
            }
        )
    return models


def blocks_data(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows, sorted by task, as one packed text a task, and the lists of steps they share."""
    tasks = np.asarray(rows["task"], dtype=object)
    ids = np.unique(tasks.astype(str), return_inverse=True)[1]
    steps = np.asarray(rows["step"], np.int64)
    keys = np.stack([ids, rows["who"], rows["how"]])
    starts = np.flatnonzero(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
    values = rounded(np.asarray(rows["value"], np.float64))
    errors = errors_data(rows["stderr"])
    lists: dict[bytes, int] = {}
    grids: list[list[int]] = []
    blocks: dict[str, list[Any]] = {}
    for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True):
        own = steps[start:stop]
        grid = lists.setdefault(own.tobytes(), len(lists))
        if grid == len(grids):
            grids.append(np.diff(own, prepend=0).tolist())
        spread = errors[start:stop]
        if not any(error is not None for error in spread):
            spread = []
        who = int(rows["who"][start])
        how = int(rows["how"][start])
        blocks.setdefault(str(tasks[start]), []).append(
            [who, how, grid, values[start:stop], spread]
        )
    packed = {
        task: compressed(json.dumps(series, separators=(",", ":")))
        for task, series in blocks.items()
    }
    shown = {task: sorted({series[1] for series in block}) for task, block in blocks.items()}
    members = {task: {series[0] for series in block} for task, block in blocks.items()}
    return {"steps": grids, "blocks": packed, "shown": shown, "members": members}


def errors_data(stderr: Any) -> list[float | None]:
    """Standard errors with few digits; None where there is none."""
    errors = np.ma.filled(np.ma.asarray(stderr, np.float64), np.nan)
    known = np.isfinite(errors)
    texts = rounded(np.where(known, errors, 0.0), ERROR_DIGITS)
    return [text if is_known else None for text, is_known in zip(texts, known, strict=True)]


def tasks_data(
    blocks: dict[str, Any], groups: Mapping[str, Sequence[str]], own: Sequence[bool]
) -> list[dict[str, Any]]:
    """The tasks by name, the means of groups first: settings that they have, and their group.

    own  which models are runs of the page.
    """
    shown = blocks.pop("shown")
    members = blocks.pop("members")
    member = {task: title for title, tasks in groups.items() for task in tasks}
    names = sorted(shown, key=lambda task: (task not in groups, task))
    return [
        {
            "name": task,
            "ways": shown[task],
            "models": len(members[task]),
            "own": sum(own[who] for who in members[task]),
            "group": member.get(task),
            "of": len(groups[task]) if task in groups else 0,
        }
        for task in names
    ]
