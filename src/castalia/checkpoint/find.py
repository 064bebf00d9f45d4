"""Which checkpoints a folder holds, and which one a path names."""

import re
from pathlib import Path

from castalia.checkpoint.names import COMPLETE, STEP_NAME, step_name
from castalia.config.anchor import CONFIG
from castalia.core.errors import CheckpointError
from castalia.core.hub import local_reading

WANTED_STEP = re.compile(r"(?:step-?)?(\d+)")
"""`step1000` (Pythia's revisions), `step-00001000`, `1000`."""


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a checkpoints folder, ascending; without COMPLETE a
    step does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    named = ((STEP_NAME.fullmatch(item.name), item) for item in folder.iterdir())
    return sorted(int(match[1]) for match, item in named if match and (item / COMPLETE).exists())


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one checkpoint.

    Takes   a step's folder; a run or checkpoints folder (its newest complete step); RUN/step1000,
            RUN/1000, RUN@1000; the config.yaml of a run or a step.
    Raises  CheckpointError listing the steps to choose from, or naming a path that is spelled
            alike.
    """
    path = folder_of(path)
    if (path / COMPLETE).exists():
        return path
    if path.is_dir() and not STEP_NAME.fullmatch(path.name):
        folder, steps = steps_of_run(path)
        if steps:
            return folder / step_name(steps[-1])
        raise CheckpointError(
            f"no complete checkpoint in {path}; give a run folder, or the folder of one step"
        )
    # RUN@STEP is the form of hub revisions, RUN/STEP that of a path.
    if "@" in path.name:
        base, _, word = str(path).rpartition("@")
    else:
        base = str(path.parent)
        word = path.name
    wanted = WANTED_STEP.fullmatch(word)
    folder, steps = steps_of_run(Path(base))
    if wanted and int(wanted[1]) in steps:
        return folder / step_name(int(wanted[1]))
    if not steps:
        raise CheckpointError(f"no checkpoint at {path}, and none in {base}{remedy(path)}")
    what = f"{word!r} is not a step"
    if wanted:
        what = f"step {int(wanted[1])} was not saved, or not completely"
    raise CheckpointError(f"no checkpoint at {path}: {what}; choose one of {ranges_of(steps)}")


def remedy(path: Path) -> str:
    """How to go on from a path that names nothing."""
    near = local_reading(path)
    if near is not None and near != path:
        return f"; did you mean {str(near)!r}? (a model of the Hugging Face hub is hf://OWNER/NAME)"
    usual = Path("runs", path.name)  # the folder of the presets' runs: `debug` for `runs/debug`
    if len(path.parts) == 1 and (usual / "checkpoints").is_dir():
        return f"; did you mean {str(usual)!r}?"
    if any(path.parent.glob("*/checkpoints")):
        return f"; `castalia runs {path.parent}` lists the runs there"
    return "; give a run folder, or RUN/step1000"


def folder_of(path: str | Path) -> Path:
    """The folder that a path names: RUN/config.yaml names RUN, as it does for `castalia train`."""
    path = Path(path)
    return path.parent if path.name == CONFIG and path.is_file() else path


def newest_first(path: str | Path) -> list[Path]:
    """The checkpoints that `path` may mean, the best first: all of a run, newest first, or the one
    step that it names.

    Raises  CheckpointError as `find_checkpoint` does.
    """
    path = folder_of(path)
    first = find_checkpoint(path)
    if first == path or not path.is_dir():
        return [first]
    folder, steps = steps_of_run(path)
    return [folder / step_name(step) for step in reversed(steps)]


def steps_of_run(path: Path) -> tuple[Path, list[int]]:
    """(checkpoints folder, its complete steps) of a run folder or of the checkpoints folder
    itself."""
    # A run folder has a subfolder for checkpoints; both are accepted wherever a run is.
    inner = path / "checkpoints"
    folder = inner if inner.is_dir() else path
    return folder, complete_steps(folder)


def ranges_of(steps: list[int]) -> str:
    """The steps as text; of a long list the first and the last few."""
    names = [str(step) for step in steps]
    if len(names) > 24:
        names = [*names[:14], "...", *names[-4:]]
    return ", ".join(names)
