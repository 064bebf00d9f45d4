"""Which checkpoints exist in a folder, and the one that a user's words mean."""

import re
from pathlib import Path

from castalia.checkpoint.manifest import COMPLETE, STEP_NAME, step_name
from castalia.core.errors import CheckpointError

WANTED_STEP = re.compile(r"(?:step-?)?(\d+)")
"""`step1000` (Pythia's revisions), `step-00001000`, `1000`."""


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of a checkpoints folder that have been saved whole, in order; a folder without COMPLETE does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    named = ((STEP_NAME.fullmatch(item.name), item) for item in folder.iterdir())
    return sorted(int(match[1]) for match, item in named if match and (item / COMPLETE).exists())


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one checkpoint.

    Takes   a step's folder; a run or checkpoints folder (its newest complete step); RUN/step1000, RUN/1000, RUN@1000.
    Raises  CheckpointError listing the steps that there are.
    """
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    if path.is_dir() and not STEP_NAME.fullmatch(path.name):
        folder, steps = steps_of_run(path)
        if steps:
            return folder / step_name(steps[-1])
        raise CheckpointError(
            f"no complete checkpoint in {path}; give a run folder, or the folder of one step"
        )
    base, _, word = (
        str(path).rpartition("@") if "@" in path.name else (str(path.parent), "", path.name)
    )
    wanted = WANTED_STEP.fullmatch(word)
    folder, steps = steps_of_run(Path(base))
    if wanted and int(wanted[1]) in steps:
        return folder / step_name(int(wanted[1]))
    if not steps:
        raise CheckpointError(
            f"no checkpoint at {path}, and none in {base}; give a run folder, or RUN/step1000"
        )
    what = (
        f"step {int(wanted[1])} was not saved (or not whole)"
        if wanted
        else f"{word!r} is not a step"
    )
    raise CheckpointError(f"no checkpoint at {path}: {what}; have: {ranges_of(steps)}")


def newest_first(path: str | Path) -> list[Path]:
    """The checkpoints that `path` may mean, the best first: all of a run, newest first, or the one step that it names.

    Raises  CheckpointError as `find_checkpoint` does.
    """
    first = find_checkpoint(path)
    if first == Path(path) or not Path(path).is_dir():
        return [first]
    folder, steps = steps_of_run(Path(path))
    return [folder / step_name(step) for step in reversed(steps)]


def steps_of_run(path: Path) -> tuple[Path, list[int]]:
    """(checkpoints folder, its complete steps) of a run folder or of the checkpoints folder itself."""
    inner = path / "checkpoints"
    folder = inner if inner.is_dir() else path
    return folder, complete_steps(folder)


def ranges_of(steps: list[int]) -> str:
    """The steps as text; of a long list the first and the last few."""
    names = [str(step) for step in steps]
    return ", ".join(names if len(names) <= 24 else [*names[:14], "...", *names[-4:]])
