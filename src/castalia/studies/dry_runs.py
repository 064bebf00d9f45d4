"""The report of a branch that is not trained."""

from castalia.core.errors import ConfigError
from castalia.data.run_rows import RunRows
from castalia.interventions.make import Interventions
from castalia.interventions.report import Report, dry_run
from castalia.stream.viewing import parse_steps
from castalia.studies.branching import Branch


def reported(rows: RunRows, branch: Branch, steps: str | None, examples: int) -> Report:
    """What a branch changes in its steps, or in those that the text `steps`, A:B, names.

    Raises  ConfigError for steps before the branch; DataError for steps that a mixed run has not
            read yet.
    """
    changes = rows.train.changes
    assert isinstance(changes, Interventions)
    total = branch.parent.train.steps
    if steps is None:
        first = max(branch.checkpoint, min(item.first for item in changes.items))
        return dry_run(rows.train, first, max(item.stop for item in changes.items), examples)
    chosen = parse_steps(steps, branch.parent.train.batches, total)
    if chosen.first < branch.checkpoint:
        raise ConfigError(
            f"--steps {steps}: the branch begins at checkpoint {branch.checkpoint}; the steps"
            " before are the run's own"
        )
    return dry_run(rows.train, chosen.first, chosen.stop, examples)
