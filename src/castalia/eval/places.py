"""The checkpoints that paths and `--steps` name: of runs, suites, folders of steps and hub ids."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from castalia.checkpoint.find import complete_steps, find_checkpoint, folder_of, ranges_of
from castalia.core.errors import CastaliaError, CheckpointError, ConfigError
from castalia.core.hub import HUB_ID, branches, is_hub_id
from castalia.eval.labels import STEP_FOLDER, is_run, origin_of, run_around, shown, step_in
from castalia.eval.single_models import (
    hash_of,
    is_alone,
    record_of,
    recorded_step,
    steps_in,
    variant_of,
)
from castalia.formats.foreign import find_foreign
from castalia.formats.remote import is_remote, local_alone
from castalia.results.schema import EVALS

RANGE = re.compile(r"(\d*):(\d*)")


class Checkpoint(NamedTuple):
    """One checkpoint to evaluate."""

    path: str
    """As `castalia.load` takes it; it names this checkpoint even when its run has newer ones."""
    suite: str
    model: str
    step: int | None
    """None where the path does not say it."""
    run: Path | None
    """The run folder; None for a model without one."""
    stores: tuple[Path, ...]
    """Folders of results: the first is the one to write, all are read."""
    variant: str = ""
    """What tells an export with rounded weights from its checkpoint: `bf16 weights`."""
    weights_hash: str | None = None
    """SHA-256 of what identifies its weights, 16 digits; the commit for a revision of the hub."""

    @property
    def title(self) -> str:
        """Model and step, for a line on the screen."""
        words = [self.model]
        if self.step is not None:
            words.append(f"step {self.step}")
        if self.variant:
            words.append(f"({self.variant})")
        return " ".join(words)


class Series(NamedTuple):
    """A model and its checkpoints by step; `steps` is empty where the step is unknown."""

    name: str
    """As the user typed it, or the folder."""
    newest: str
    """Path of the newest checkpoint, which stands for the series."""
    steps: Mapping[int, str]
    """Path of each step."""
    commits: Mapping[str, str] = {}
    """Commit of each path of the hub, as far as known."""


class Steps(NamedTuple):
    """What `--steps` asks for."""

    text: str
    items: tuple[int | str | tuple[int, int | None], ...]
    """`all`, `last`, a step, or the first and last step of a range; None is an open end."""

    @classmethod
    def of(cls, text: str) -> "Steps":
        """Read `all`, `last`, `0,1,2`, `1000:5000` (both included), or several between commas.

        Raises  ConfigError.
        """
        items: list[int | str | tuple[int, int | None]] = []
        for word in (word.strip() for word in text.split(",")):
            span = RANGE.fullmatch(word)
            number = word.removeprefix("step")
            if word in ("all", "last"):
                items.append(word)
            elif span is not None and word != ":":
                items.append((int(span[1] or 0), int(span[2]) if span[2] else None))
            elif number.isdecimal():
                items.append(int(number))
            else:
                raise ConfigError(
                    f"--steps {text!r}: {word!r} is not a step; expected all, last, steps between"
                    " commas such as 0,1,1000, or a range such as 1000:5000"
                )
        return cls(text, tuple(items))

    def chosen(self, series: Series) -> list[int]:
        """The steps of a series that are asked for, ascending.

        Raises  CheckpointError for a step that it lacks.
        """
        have = sorted(series.steps)
        chosen: set[int] = set()
        for item in self.items:
            if item == "all":
                chosen.update(have)
            elif item == "last":
                chosen.update(have[-1:])
            elif isinstance(item, tuple):
                first, last = item
                inside = [s for s in have if first <= s and (last is None or s <= last)]
                if not inside:
                    raise missing_step(series, f"no checkpoint from {first} to {last or 'its end'}")
                chosen.update(inside)
            elif item in series.steps:
                chosen.add(int(item))
            else:
                raise missing_step(series, f"no checkpoint of step {item}", int(item))
        return sorted(chosen)


def missing_step(series: Series, what: str, step: int | None = None) -> CheckpointError:
    """The error about a step that does not exist, with the nearest ones and all."""
    have = sorted(series.steps)
    if not have:
        return CheckpointError(
            f"{series.name} is one checkpoint, whose step is unknown; omit --steps"
        )
    near = ""
    if step is not None:
        below = [str(s) for s in have if s < step][-1:]
        above = [str(s) for s in have if s > step][:1]
        near = f"; the nearest is {' or '.join(below + above)}"
    return CheckpointError(f"{series.name} has {what}{near}; it has {ranges_of(have)}")


def checkpoints_of(
    paths: Sequence[str | os.PathLike[str]],
    steps: str | None = None,
    store: str | os.PathLike[str] | None = None,
) -> list[Checkpoint]:
    """The checkpoints that paths name, each once.

    Takes   paths: a run, RUN/step1000, a suite (a folder of runs or models), a folder of step
            folders, and whatever else `castalia.load` takes.
            steps: see `Steps.of`; None for the newest of every model.
            store: folder of the results; None for `evals` in the run or suite, else here.
    Raises  CheckpointError for a path without a checkpoint, or a step that does not exist;
            ConfigError for malformed steps.
    """
    asked = None
    if steps is not None:
        asked = Steps.of(steps)
    found: dict[str, Checkpoint] = {}
    for path in paths:
        text = os.fspath(path)
        results = store
        if is_remote(text):
            text = str(local_alone(text, steps))
            # As of a model of the hub: nobody looks for results in the cache.
            results = store or EVALS
        members = series_of(text, listed=asked is not None)
        # A folder of several models keeps their results together.
        suite = None
        if members is None:
            suite = Path(text)
        for series in members or models_in(Path(text)):
            for place in chosen_paths(series, asked):
                checkpoint = checkpoint_at(place, series, suite, results)
                # Of runs/a and runs/../runs/a the first stands.
                found.setdefault(os.path.abspath(checkpoint.path), checkpoint)
    return list(found.values())


def chosen_paths(series: Series, asked: Steps | None) -> list[str]:
    """Paths of the checkpoints of a series that are asked for."""
    if asked is None:
        return [series.newest]
    if not series.steps and set(asked.items) <= {"all", "last"}:
        return [series.newest]  # all of its one checkpoint
    return [series.steps[step] for step in asked.chosen(series)]


def checkpoint_at(
    path: str, series: Series, suite: Path | None, store: str | os.PathLike[str] | None
) -> Checkpoint:
    """The checkpoint at one path."""
    origin = origin_of(path)
    step = origin.step
    if step is None:
        step = next((number for number, place in series.steps.items() if place == path), None)
    commit = series.commits.get(path)
    return Checkpoint(
        path=path,
        suite=origin.suite,
        model=origin.model,
        step=step,
        run=origin.run,
        stores=stores_for(origin.run, suite, store),
        variant=variant_of(path),
        weights_hash=commit[:16] if commit else hash_of(path),
    )


def stores_for(
    run: Path | None, suite: Path | None, store: str | os.PathLike[str] | None
) -> tuple[Path, ...]:
    """Where results of a checkpoint go, and where else they may be already."""
    if store is not None:
        return (Path(store),)
    if run is None:
        return (Path(EVALS) if suite is None else suite / EVALS,)
    own = Path(shown(run)) / EVALS
    around = Path(shown(run.parent)) / EVALS
    # Evaluated alone or as one of its suite, a run's numbers are the same.
    return (own, around) if suite is None else (suite / EVALS, own)


def series_of(text: str, *, listed: bool = True) -> list[Series] | None:
    """The one model that a path names, as a list; None for a folder of models.

    listed  whether the hub is asked for the steps of a model.
    Raises  CheckpointError if the path names nothing.
    """
    if is_hub_id(text):
        return [hub_series(text) if listed else Series(text, text, {})]
    path = folder_of(text)
    if path.is_dir() and is_run(path.absolute()):
        return [run_series(path)]
    # Of a checkpoints folder too; the folder of one step is one checkpoint.
    run = run_around(path.absolute())
    if run is not None and path.name == "checkpoints":
        return [run_series(Path(shown(run)))]
    if is_alone(path):
        return [alone(path)]
    if not path.is_dir():
        if find_foreign(path) is not None:  # SAVE@1000 of GPT-NeoX
            return [alone(path)]
        # RUN/step1000 and its like, or the error that lists what there is.
        step = step_in(find_checkpoint(path).name)
        assert step is not None
        return [Series(text, text, {step: text})]
    numbered = steps_in(path)
    if numbered:
        return [by_folder(path, numbered)]
    return None


def alone(path: Path) -> Series:
    """A model of one checkpoint."""
    step = step_in(path.name)
    if step is None:
        step = recorded_step(path)
    return Series(str(path), str(path), {} if step is None else {step: str(path)})


def run_series(run: Path) -> Series:
    """A run.

    Raises  CheckpointError without a complete checkpoint.
    """
    steps = complete_steps(run / "checkpoints")
    if not steps:
        raise CheckpointError(f"{run} has no complete checkpoint yet; train it further")
    paths = {step: os.path.join(run, f"step{step}") for step in steps}
    return Series(str(run), paths[steps[-1]], paths)


def by_folder(folder: Path, steps: Mapping[int, str]) -> Series:
    """A folder of step folders, such as exports of a run or GPT-NeoX's `save`."""
    # GPT-NeoX's `latest` decides which one the folder means.
    foreign = find_foreign(folder)
    if foreign is None:
        newest = steps[max(steps)]
    else:
        newest = str(foreign[1])
    return Series(str(folder), newest, steps)


def hub_series(text: str) -> Series:
    """A model of the hub: one revision, or those that are named after their steps.

    Raises  CheckpointError where the hub does not list them.
    """
    parts = HUB_ID.fullmatch(text)
    assert parts is not None, text
    step = step_in(parts["revision"] or "")
    if parts["revision"] is not None:
        return Series(text, text, {} if step is None else {step: text})
    steps: dict[int, str] = {}
    commits: dict[str, str] = {}
    for name, commit in branches(text).items():
        named = STEP_FOLDER.fullmatch(name)
        place = text
        if named is not None:
            place = f"{text}@{name}"
        if named is not None:
            steps[int(named[1])] = place
        if named is not None or name == "main":
            commits[place] = commit
    return Series(text, text, dict(sorted(steps.items())), commits)


def models_in(suite: Path) -> list[Series]:
    """The models in a suite's folder, by name; runs without a checkpoint are left out.

    Raises  CheckpointError if there is none.
    """
    found: list[Series] = []
    for item in sorted(suite.iterdir()):
        if not item.is_dir() or item.name.startswith("."):
            continue
        if is_run(item.absolute()) and not complete_steps(item / "checkpoints"):
            continue
        if is_run(item.absolute()) or is_alone(item) or steps_in(item):
            found += series_of(str(item)) or []
    if not found:
        raise CheckpointError(
            f"{suite} is no run and no model, and no folder in it is one; give a run, a checkpoint,"
            " or a folder of runs or Hugging Face folders"
        )
    return found


def origin_of_export(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint that an export was made from; None if it is gone, itself for any other."""
    record = record_of(checkpoint.path)
    if record is None:
        return checkpoint
    if checkpoint.run is not None and checkpoint.step is not None:
        place = os.path.join(shown(checkpoint.run), f"step{checkpoint.step}")
    else:
        place = str(record.get("checkpoint"))
    try:
        (origin,) = checkpoints_of([place])
    except CastaliaError:
        return None
    return origin._replace(stores=checkpoint.stores)
