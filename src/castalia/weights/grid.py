"""The steps that a model is expected to have."""

from collections.abc import Iterator

from castalia.checkpoint.config import PYTHIA_EARLY
from castalia.checkpoint.names import COMPLETE, STEP_NAME
from castalia.checkpoint.policy import SavePolicy
from castalia.core.errors import ConfigError
from castalia.weights.findings import Finding
from castalia.weights.series import Series
from castalia.weights.still import PYTHIA

PYTHIA_GRID = [*PYTHIA_EARLY, *range(1000, 143_001, 1000)]
"""The 154 steps of each of Pythia's models."""
RANGE_PARTS = 3
NAMED = 8
"""Steps that a sentence has, of many."""


def expected_steps(text: str) -> list[int]:
    """The steps that `--expect` names: `pythia`, or steps and ranges FIRST:LAST:EVERY between
    commas, both ends included.

    Raises  ConfigError.
    """
    if text == "pythia":
        return PYTHIA_GRID
    steps: set[int] = set()
    for word in text.split(","):
        parts = word.strip().split(":")
        if not all(part.isdecimal() for part in parts) or len(parts) not in (1, RANGE_PARTS):
            raise ConfigError(
                f"--expect {text!r}: {word!r} is not a step; expected pythia, or steps between"
                " commas such as 0,1,2 and ranges such as 1000:143000:1000"
            )
        numbers = [int(part) for part in parts]
        if len(numbers) == 1:
            steps.add(numbers[0])
            continue
        first, last, every = numbers
        if not every or last < first:
            raise ConfigError(f"--expect {text!r}: the range {word!r} has no steps")
        steps.update(range(first, last + 1, every))
    return sorted(steps)


def grid_of(series: Series, expect: list[int] | None) -> list[int] | None:
    """The steps that a model should have; None where nothing says it."""
    if expect is not None:
        return expect
    config = series.config()
    if series.is_run and config is not None:
        policy = SavePolicy(config.checkpoint, config.train.steps)
        trained = max((revision.step or 0 for revision in series.revisions), default=0)
        due = [step for step in policy.all_steps() if step <= trained]
        return [step for step in due if step not in policy.expired(due)]
    have = {revision.step for revision in series.revisions}
    # A folder of a few revisions is a choice; one of most has gaps.
    if PYTHIA.search(series.name) and len(have & set(PYTHIA_GRID)) > len(PYTHIA_GRID) / 2:
        return PYTHIA_GRID
    return None


def grid_findings(series: Series, expect: list[int] | None) -> Iterator[Finding]:
    """Revisions that are missing from the grid or are not on it, and steps half saved."""
    grid = grid_of(series, expect)
    have = {revision.step for revision in series.revisions if revision.step is not None}
    if grid is not None:
        missing = sorted(set(grid) - have)
        if missing:
            what = (
                f"{len(missing)} of {len(grid)} expected revisions are missing: {listed(missing)}"
            )
            yield Finding("missing", str(series.folder), what)
        more = sorted(have - set(grid))
        # A run also saves where it is stopped.
        if more and not series.is_run:
            what = f"{len(more)} revisions are not on the expected grid: {listed(more)}"
            yield Finding("extra", str(series.folder), what)
    yield from incomplete_findings(series)


def incomplete_findings(series: Series) -> Iterator[Finding]:
    """Folders of steps that a run did not save completely."""
    folder = series.folder / "checkpoints"
    for item in sorted(folder.iterdir()) if series.is_run and folder.is_dir() else ():
        if STEP_NAME.fullmatch(item.name) and not (item / COMPLETE).exists():
            what = f"it has no {COMPLETE}: the save was interrupted, or files were removed"
            yield Finding("incomplete", str(item), what)


def listed(steps: list[int]) -> str:
    """Steps between commas, the first few of many."""
    more = ""
    if len(steps) > NAMED:
        more = ", ..."
    return ", ".join(str(step) for step in steps[:NAMED]) + more
