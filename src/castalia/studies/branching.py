"""A branch of a run: the same run from one of its checkpoints on, with other text and all else
equal, beside a control without a change."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castalia.checkpoint.find import complete_steps, ranges_of
from castalia.checkpoint.manifest import read_manifest
from castalia.checkpoint.names import step_name
from castalia.checkpoint.tensors import checkpoint_tensors
from castalia.config.values import Values, flatten, parse_override, read_yaml
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import read_json, write_json
from castalia.data.fingerprint import changed, of_training
from castalia.data.intervention_config import SHARE, as_step, step_or_share
from castalia.monitor.sinks.jsonl import recorded_hashes
from castalia.recipes import resolve
from castalia.runs.config import RunConfig
from castalia.runs.rows import rows_as_trained
from castalia.stream.same_data import newest_fingerprint
from castalia.train.run import run

RESULT = "intervention.json"
"""In the folder of a branch: what was compared, and what came out."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Branch:
    """Where a run branches, and into what."""

    parent: RunConfig
    at: int
    """The step from which rows may differ."""
    checkpoint: int
    """The newest checkpoint up to there, from which the branch is trained."""
    name: str
    sections: list[dict[str, Any]]
    """The parent's interventions and then the new ones, none of which begins before `at`."""
    words: tuple[str, ...] = ()
    """Further overrides, of branch and control alike."""
    place: Path | None = None
    """Where the folders of branches are; None for beside the parent's."""

    def folder(self, name: str) -> Path:
        """The folder of the branch of a name."""
        parent = Path(self.parent.output)
        place = parent.parent
        if self.place is not None:
            place = self.place
        return place / f"{parent.name}-from-{self.checkpoint}-{name}"

    @property
    def control(self) -> RunConfig:
        """The branch without a change, which every branch from that checkpoint shares."""
        return self.config("control", self.own_sections)

    @property
    def changed(self) -> RunConfig:
        """The branch with its interventions."""
        return self.config(self.name, self.sections)

    @property
    def planned(self) -> RunConfig:
        """The run's own config with the interventions: its rows without a branch.

        The order of a mixed run is in the run's folder.
        """
        words = [self.parent.output, f"data.interventions={json.dumps(self.sections)}"]
        return resolve([*words, *self.words]).config

    @property
    def own_sections(self) -> list[dict[str, Any]]:
        """The parent's interventions."""
        return [section.model_dump(mode="json") for section in self.parent.data.interventions]

    def config(self, name: str, sections: list[dict[str, Any]]) -> RunConfig:
        """The config of a branch."""
        return resolve(self.command_words(name, sections)).config

    def command_words(self, name: str, sections: list[dict[str, Any]]) -> list[str]:
        """The words of `castalia train` for a branch."""
        return [
            # The run's folder as the config: a branch differs in what follows, and in nothing else.
            self.parent.output,
            f"output={self.folder(name)}",
            f"model.start={self.parent.output}@{self.checkpoint}",
            "train.start_optimizer=true",
            "train.start_step=true",
            f"data.interventions={json.dumps(sections)}",
            *self.words,
        ]


def plan_branch(
    run_folder: str,
    at: str,
    words: Sequence[str],
    *,
    name: str | None = None,
    place: Path | None = None,
) -> Branch:
    """The branch that the words of a command describe.

    words   YAML files with `interventions`, and overrides; `interventions=[…]` among them.
    Raises  ConfigError; CheckpointError if no checkpoint up to that step can be continued.
    """
    parent = resolve([run_folder]).config
    try:
        step = as_step(step_or_share(at), parent.train.steps)
    except ValueError as error:
        raise ConfigError(f"--at {at}: {error}") from None
    if step >= parent.train.steps:
        raise ConfigError(
            f"--at {at}: step {step}, but {parent.output} has steps 0 to {parent.train.steps - 1}"
        )
    sections, rest = sections_of(words)
    checkpoint = checkpoint_at(Path(parent.output), step)
    own = [section.model_dump(mode="json") for section in parent.data.interventions]
    # None may begin earlier: between the checkpoint and `at` the branch would read other rows than
    # the run.
    new = [begun(section, step, parent.train.steps) for section in sections]
    name = name or "-".join(dict.fromkeys(str(section.get("kind", "swap")) for section in new))
    if name == "control" or "/" in name:
        raise ConfigError(f"--name {name!r}: choose another; `control` is the unchanged branch")
    return Branch(parent, step, checkpoint, name, own + new, tuple(rest), place)


def sections_of(words: Sequence[str]) -> tuple[list[Values], list[str]]:
    """The new interventions that words name, and the other words.

    Raises  ConfigError if there are none, or a file holds none.
    """
    sections: list[Values] = []
    rest = []
    for word in words:
        if "=" not in word:
            found = inner(read_yaml(word))
            if not found:
                raise ConfigError(f"{word}: expected `interventions:`, a list of sections")
        elif word.split("=")[0] in ("interventions", "data.interventions"):
            found = inner(parse_override(word))
        else:
            rest.append(word)
            continue
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ConfigError(f"{word}: interventions are a list of sections, got {found!r:.80}")
        sections += found
    if not sections:
        raise ConfigError(
            "name what changes: a YAML file with `interventions:`, or 'interventions=[{kind: swap,"
            " terms: [[he, she]]}]'"
        )
    return sections, rest


def inner(values: Values) -> Any:
    """The interventions of a file or an override, at its top or in its section data."""
    data = values.get("data")
    within = values
    if isinstance(data, dict):
        within = data
    return within.get("interventions")


def begun(section: Values, step: int, total: int) -> Values:
    """A section that changes nothing before a step: of its start the later one counts."""
    start = section.get("start", step)
    if isinstance(start, str) and SHARE.fullmatch(start):
        start = as_step(start, total)
    # Of anything but a number the check of the config has something to say.
    if isinstance(start, int):
        start = max(step, start)
    return {**section, "start": start}


def checkpoint_at(folder: Path, step: int) -> int:
    """The newest checkpoint up to a step from which training can go on.

    Raises  CheckpointError listing those that were saved.
    """
    steps = complete_steps(folder / "checkpoints")
    whole = [saved for saved in steps if can_continue(folder, saved)]
    before = [saved for saved in whole if saved <= step]
    if before:
        return before[-1]
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint to branch from; train it first")
    if not whole:
        raise CheckpointError(
            f"the checkpoints of {folder} hold weights alone, without the state of an optimizer, so"
            " that training cannot go on from them"
        )
    raise CheckpointError(
        f"{folder} has no checkpoint up to step {step}; those to branch from: {ranges_of(whole)}"
    )


def can_continue(folder: Path, step: int) -> bool:
    """Whether a checkpoint has the state of its run and of the optimizer."""
    place = folder / "checkpoints" / step_name(step)
    names = read_manifest(place).tensors
    # SGD without momentum keeps none; a checkpoint of a run has its progress in any case.
    state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    return "progress" in state and (step == 0 or any(name.startswith("optim.") for name in names))


def train_branch(branch: Branch, say: Say) -> dict[str, Any]:
    """Train the control and the branch, as far as they are not, and compare; writes RESULT.

    A training that was stopped goes on.
    Raises  as `require_same_branch` and what training raises.
    """
    folders = {}
    for title, config in (("control", branch.control), (branch.name, branch.changed)):
        folders[title] = config.output
        done = complete_steps(Path(config.output) / "checkpoints")
        # Several branches share a control; the second one finds it trained.
        if done and done[-1] >= config.train.steps:
            require_same_branch(branch, config)
            say(f"{title}: {config.output} is trained")
            continue
        say(f"{title}: training {config.output} from step {branch.checkpoint}")
        with threads_of(Path(branch.parent.output)):
            run(config, ["castalia", "train", config.output])
    control = Path(folders["control"])
    result = {
        "run": branch.parent.output,
        "at": branch.at,
        "checkpoint": branch.checkpoint,
        "folders": folders,
        "interventions": branch.sections,
        "control_and_run": compared(Path(branch.parent.output), control, branch.checkpoint),
        "steps_with_other_rows": other_rows(control, Path(folders[branch.name])),
    }
    write_json(Path(folders[branch.name]) / RESULT, result)
    return result


@contextmanager
def threads_of(folder: Path) -> Iterator[None]:
    """As many threads of torch as the run in a folder had: another number adds up in another order,
    and the control would differ from the run in its last bits."""
    before = torch.get_num_threads()
    path = folder / "env.json"
    recorded = None
    if path.is_file():
        recorded = read_json(path).get("threads")
    torch.set_num_threads(recorded or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_same_branch(branch: Branch, config: RunConfig) -> None:
    """Check that a branch that was trained before is the one that is asked for: its rows, and the
    values of the further overrides. One that is not finished is compared as it is resumed.

    Raises  ConfigError naming what differs.
    """
    folder = Path(config.output)
    trained = newest_fingerprint(folder / "checkpoints")
    _, rows = rows_as_trained(config, lambda text: None)
    differences = []
    # The fingerprint has the hash of the interventions beside that of the data.
    if trained is not None:
        differences = changed(of_training(trained), of_training(rows.fingerprint))
    saved = resolve([str(folder)]).config
    before, now = (flatten(each.model_dump(mode="json")) for each in (saved, config))
    for key in [key for word in branch.words for key in flatten(parse_override(word))]:
        if before.get(key) != now.get(key):
            differences.append(f"{key} was {before.get(key)}, is {now.get(key)}")
    if differences:
        raise ConfigError(
            f"{folder} was trained as another branch: {'; '.join(differences)}; choose another"
            " --name, or delete that folder"
        )


def compared(one: Path, other: Path, after: int) -> dict[str, Any]:
    """Whether two runs have equal bits in every checkpoint behind step `after` that both saved.

    Returns  `steps` compared; `equal`, None where there was nothing to compare; `difference`, the
             first one: step, tensor and the largest difference of a number.
    """
    steps = [set(complete_steps(folder / "checkpoints")) for folder in (one, other)]
    common = sorted(step for step in steps[0] & steps[1] if step > after)
    difference = None
    # The first difference is the cause; all later ones follow from it.
    for step in common:
        difference = next(differences(one, other, step), None)
        if difference is not None:
            break
    # Nothing compared is no proof of equality.
    equal = None
    if common:
        equal = difference is None
    return {"steps": common, "equal": equal, "difference": difference}


def differences(one: Path, other: Path, step: int) -> Iterator[dict[str, Any]]:
    """The tensors, weights and moments, whose bits differ between two runs' checkpoints."""
    folders = [folder / "checkpoints" / step_name(step) for folder in (one, other)]
    tensors = [checkpoint_tensors(folder, read_manifest(folder), "") for folder in folders]
    for name in sorted(tensors[0].keys() ^ tensors[1].keys()):
        yield {"step": step, "tensor": name, "largest": None}
    for name in sorted(tensors[0].keys() & tensors[1].keys()):
        first, second = (side[name] for side in tensors)
        if first.shape != second.shape or not torch.equal(bits(first), bits(second)):
            largest = None
            # In double: the difference of two large floats would round to 0.
            if first.shape == second.shape:
                largest = float((first.double() - second.double()).abs().max())
            yield {"step": step, "tensor": name, "largest": largest}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as bytes: NaN equals itself, and 0 is not -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def other_rows(one: Path, other: Path) -> list[int]:
    """The steps, counted from 0, whose rows two runs hashed differently."""
    hashes = [recorded_hashes(folder / "metrics.jsonl") for folder in (one, other)]
    common = sorted(hashes[0].keys() & hashes[1].keys())
    return [step for step in common if hashes[0][step] != hashes[1][step]]
