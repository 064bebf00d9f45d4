"""The report of a branch that is not trained."""

from pathlib import Path

from castalia.checkpoint.find import complete_steps
from castalia.core.errors import ConfigError, DataError
from castalia.data.run_rows import RunRows
from castalia.interventions.make import Interventions
from castalia.interventions.report import Report, dry_run
from castalia.runs.rows import rows_as_trained
from castalia.stream.opening import Stream
from castalia.stream.viewing import parse_steps
from castalia.studies.branching import Branch


def require_allowed(branch: Branch) -> None:
    """Check that training will not stop at a change of the branch, before any of it trains: the
    control comes first and may take days.

    Raises  ConfigError naming the first place where `length: refuse` meets another length.
    """
    checked = any(
        section.get("kind", "swap") in ("swap", "regex", "function")
        and section.get("length", "refuse") == "refuse"
        for section in branch.sections
    )
    if not checked or complete_steps(Path(branch.folder(branch.name)) / "checkpoints"):
        return
    try:
        _, rows = rows_as_trained(branch.planned, lambda text: None)
        report = reported(rows, branch, None, 1)
    except DataError:  # rows that a mixed run has not chosen yet: only its training can tell
        return
    if report.rows_refused:
        raise ConfigError(
            f"training would stop at {report.rows_refused:,} of {report.rows:,} rows, and nothing"
            f" is trained; the first: {report.refused[0]}"
        )


def reported(rows: RunRows, branch: Branch, steps: str | None, examples: int) -> Report:
    """What a branch changes in its steps, or in those that the text `steps`, A:B, names.

    Raises  ConfigError for steps before the branch; DataError for steps that a mixed run has not
            read yet.
    """
    changes = rows.train.changes
    assert isinstance(changes, Interventions)
    curriculum = Stream(branch.planned, rows, None).curriculum
    if steps is None:
        first = max(branch.checkpoint, min(item.first for item in changes.items))
        stop = max(item.stop for item in changes.items)
        return dry_run(rows.train, first, stop, curriculum, examples)
    total = branch.parent.train.steps
    chosen = parse_steps(steps, branch.parent.train.batches, total)
    if chosen.first < branch.checkpoint:
        raise ConfigError(
            f"--steps {steps}: the branch begins at checkpoint {branch.checkpoint}; the steps"
            " before are the run's own"
        )
    return dry_run(rows.train, chosen.first, chosen.stop, curriculum, examples)
