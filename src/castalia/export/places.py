"""Where exports go: their folders, and what may be replaced."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castalia.checkpoint import complete_steps, find_checkpoint
from castalia.checkpoint.names import step_name
from castalia.core.errors import ConfigError
from castalia.formats.export_record import RECORD
from castalia.formats.saved_model import is_model_alone


@dataclass(frozen=True)
class Destination:
    """One checkpoint and the folder that it becomes."""

    checkpoint: Path
    folder: Path


def destinations(
    checkpoint: str | Path,
    output: str | Path | None,
    name: str,
    steps: Sequence[int] | Literal["all"] | None,
) -> list[Destination]:
    """Which checkpoint goes where; `name` is the export's folder inside a run.

    Raises  ConfigError if no place to write to is given or implied; CheckpointError if a step does
            not exist.
    """
    given = Path(checkpoint)
    if is_model_alone(given):
        if output is None or steps is not None:
            raise ConfigError(f"{given} is one model without a run: give output, and no steps")
        return [Destination(given, Path(output))]
    step = find_checkpoint(checkpoint)
    if steps is None and output is not None:
        return [Destination(step, Path(output))]
    if output is not None:
        base = Path(output)
    else:
        base = default_place(step, name)
    if steps is None:
        return [Destination(step, base / revision(step))]
    if steps == "all":
        chosen = complete_steps(step.parent)
    else:
        chosen = sorted(set(steps))
    folders = [find_checkpoint(step.parent / step_name(number)) for number in chosen]
    return [Destination(folder, base / revision(folder)) for folder in folders]


def default_place(step_folder: Path, name: str) -> Path:
    """RUN/exports/NAME for RUN/checkpoints/step-00001000.

    Raises  ConfigError if the checkpoint is not inside a run folder.
    """
    if step_folder.parent.name != "checkpoints":
        raise ConfigError(
            f"{step_folder} is not inside a run folder (RUN/checkpoints/step-…); give output"
        )
    return step_folder.parent.parent / "exports" / name


def revision(step_folder: Path) -> str:
    """step1000 for step-00001000: the name of Pythia's revisions."""
    return f"step{int(step_folder.name.removeprefix('step-'))}"


def require_replaceable(folder: Path, force: bool) -> None:
    """Raises  ConfigError if `folder` holds something that this export may not replace."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not force:
        raise ConfigError(
            f"{folder} exists already; use --force to replace it, or choose another output"
        )
    if folder.exists() and not (folder / RECORD).is_file():
        raise ConfigError(
            f"{folder} is not an export (it has no {RECORD}), so --force does not replace it;"
            " choose another output"
        )
