"""The numbers of the harness's groups, such as mmlu, from those of their tasks."""

from collections.abc import Sequence
from typing import Any

from castalia.core.errors import CastaliaError, DataError
from castalia.eval.found import latest, rows_with
from castalia.eval.harness.numbers import numbers_of
from castalia.eval.harness.tasks import Part, TaskSet
from castalia.eval.labels import Labels
from castalia.eval.places import Checkpoint
from castalia.eval.shares import ALONE, Share
from castalia.eval.work import Expected, HarnessWork, Measured, Work
from castalia.inference import LanguageModel
from castalia.results import Result
from castalia.results.store import now

UNKNOWN = "N/A"
"""What the harness writes for an error that it does not know."""


class GroupWork(Work):
    """The groups of one name, after their tasks: means of numbers that stand in the table, for
    which the model reads nothing again."""

    def __init__(self, tasks: TaskSet, members: Sequence[HarnessWork]) -> None:
        (self.part,) = tasks.parts
        self.members = {each.name: each for each in members}
        self.name = self.part.name
        self.shots = tasks.shots
        self.hashes = self.part.hashes(tasks.prompting())

    def expected(self, checkpoint: Checkpoint) -> list[Expected]:
        """See `Work`."""
        from castalia.eval.harness.evaluate import harness_name

        rows = []
        for name, group in self.part.loaded["groups"].items():
            members = [self.members[task.task_name] for task in group.get_all_tasks()]
            shots = {each.examples for each in members}
            # The harness names a number for a group only if its tasks agree.
            common = self.shots
            if len(shots) == 1:
                common = shots.pop()
            # Of a task without the metric no document counts.
            counts = {
                sum(each.documents() for each in members if metric.metric in each.metrics())
                for metric in group.aggregate_metric_list or ()
            }
            rows += [
                Expected(name, common, count, harness_name(), self.hashes[name])
                for count in sorted(counts - {0})
            ]
        return rows

    def lacking(self, rows: Sequence[Result]) -> list[str]:
        """The tasks without a row."""
        return sorted(self.members.keys() - {row.task for row in rows})

    def requests(self, checkpoint: Checkpoint) -> int:
        """See `Work`."""
        return 0

    def measure(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        labels: Labels,
        share: Share = ALONE,
        before: Sequence[Result] = (),
    ) -> Measured:
        """See `Work`.

        Raises  DataError if a task of it has no numbers, or the table is damaged.
        """
        members = self.members.values()
        expected = [row for each in members for row in each.expected(checkpoint)]
        rows = latest(before, expected)
        if self.lacking(rows):
            rows = latest([*before, *standing(checkpoint, labels, share)], expected)
        lacking = self.lacking(rows)
        if lacking:
            raise DataError(
                "its means need the numbers of all its tasks, and there are none of"
                f" {', '.join(lacking[:5])}{', …' if len(lacking) > 5 else ''}"
            )
        output = aggregated(self.part, rows) | {"task_hashes": self.hashes}
        numbers = numbers_of(output, self.hashes, seconds_of(self.part, rows), self.shots)
        more: dict[str, Any] = {
            "harness": rows[0].harness,
            "batch": rows[0].batch,
            "evaluated_at": now(),
        }
        results = [labels.result(**number._asdict(), **more) for number in numbers]
        return Measured(results, output, {})


def standing(checkpoint: Checkpoint, labels: Labels, share: Share) -> list[Result]:
    """The rows that the tables have, as the first rank reads them: it alone writes them.

    Raises  DataError on every rank if a table is damaged.
    """
    rows: list[Result] = []
    reason: CastaliaError | None = None
    if share.rank == 0:
        try:
            rows = rows_with(checkpoint, labels)
        except CastaliaError as error:
            reason = error
    rows, reason = share.gather((rows, reason))[0]
    if reason is not None:
        raise reason
    return rows


def aggregated(part: Part, rows: Sequence[Result]) -> dict[str, Any]:
    """What the harness says about the groups of a part, of the rows of its tasks."""
    from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

    tasks = EvalAcc(groups=part.loaded["groups"])
    for row in rows:
        metrics = tasks.metrics.setdefault(row.task, {"sample_len": 0})
        metrics[f"{row.metric},{row.filter}"] = row.value
        stderr: float | str = UNKNOWN
        if row.stderr is not None:
            stderr = row.stderr
        metrics[f"{row.metric}_stderr,{row.filter}"] = stderr
        # The harness weighs a task by all of its documents.
        metrics["sample_len"] = max(metrics["sample_len"], row.documents or 0)
        tasks.num_fewshot[row.task] = row.shots
        tasks.higher_is_better.setdefault(row.task, {})[row.metric] = row.higher_is_better
    whole = aggregate_groups(tasks)._to_eval_results()
    named = set(part.loaded["groups"])
    tables = {
        key: {name: value for name, value in whole[key].items() if name in named}
        for key in ("results", "versions", "n-shot", "higher_is_better")
    }
    return {
        **tables,
        "groups": whole.get("groups", {}),
        "group_subtasks": whole["group_subtasks"],
    }


def seconds_of(part: Part, rows: Sequence[Result]) -> dict[str, float]:
    """Seconds of each group: those of its tasks."""
    spent = {row.task: row.seconds or 0.0 for row in rows}
    return {
        name: sum(spent[task.task_name] for task in group.get_all_tasks())
        for name, group in part.loaded["groups"].items()
    }
