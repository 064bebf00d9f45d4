"""Weight statistics of many checkpoints, one tensor at a time, into one table.

Every checkpoint is compared with the first of its model, with the one before it, and with the same
step of the first model that has its shapes, such as another seed.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import claimed
from castalia.eval.labels import config_of_run, start_seed_in
from castalia.eval.places import Checkpoint, checkpoints_of
from castalia.formats.export_record import check_export
from castalia.formats.saved_model import open_model
from castalia.weights.statistics import Between, Sums, between, spectrum, summed, sums_of
from castalia.weights.table import (
    Row,
    assemble,
    done,
    has_parts,
    parts_folder,
    remove_parts,
    write_part,
)

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
TRAVEL = {
    "start": ("from_start", "cosine_start"),
    "previous": ("from_previous", None),
    "peer": ("peer_distance", "peer_cosine"),
}
"""What a checkpoint is compared with -> columns of the distance and of the cosine."""


class Measured(NamedTuple):
    """One checkpoint that was measured now."""

    model: str
    step: int
    rows: int


@dataclass
class Member:
    """A model and all of its checkpoints."""

    name: str
    seed: int | None
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    """By step, ascending."""
    peer: "Member | None" = None

    @property
    def first(self) -> int:
        """The step of the first checkpoint."""
        return next(iter(self.checkpoints))

    def before(self, step: int) -> int | None:
        """The step of the checkpoint before one."""
        return max((each for each in self.checkpoints if each < step), default=None)

    def compared(self, step: int) -> dict[str, Checkpoint]:
        """What the checkpoint of a step is compared with."""
        others = {"start": self.checkpoints[self.first]}
        previous = self.before(step)
        if previous is not None:
            others["previous"] = self.checkpoints[previous]
        if self.peer is not None and step in self.peer.checkpoints:
            others["peer"] = self.peer.checkpoints[step]
        return others


@dataclass(frozen=True)
class Together:
    """The sums of a tensor, and of it against what it is compared with."""

    sums: Sums
    between: dict[str, Between]


def sweep(
    paths: Sequence[str],
    output: str,
    *,
    steps: str | None = None,
    spectra: bool = False,
    on_checkpoint: Callable[[str, int, int], Any] | None = None,
) -> list[Measured]:
    """Measure the checkpoints and write the table; what an earlier call measured stays.

    Takes   paths: as `castalia eval` takes them. steps: those to measure, by default all.
            spectra: also the singular values of matrices.
            on_checkpoint: called with the next checkpoint, how many are done, and of how many.
    Raises  CheckpointError, ConfigError or DataError, in one sentence.
    """
    place = Path(output)
    if place.suffix != ".parquet":
        raise ConfigError(f"--output {output}: name the file FILE.parquet")
    # All of them, also those not measured: the first and the previous one are compared with.
    members = members_of(paths)
    wanted = {each.path for each in checkpoints_of(paths, steps or "all")}
    measured: list[Measured] = []
    with claimed(parts_folder(place)):
        known = done(place)
        jobs = [
            (member, step, identity)
            for member in members
            for step, checkpoint in member.checkpoints.items()
            if checkpoint.path in wanted
            if (identity := identity_of(member, step, spectra)) not in known
        ]
        for number, (member, step, identity) in enumerate(jobs):
            if on_checkpoint is not None:
                on_checkpoint(f"{member.name} step {step}", number, len(jobs))
            rows = list(rows_of(member, step, spectra, identity))
            # A part for each checkpoint, so that a kill costs one of them.
            write_part(place, identity, rows)
            measured.append(Measured(member.name, step, len(rows)))
        # Also the parts of a call that was killed just before.
        if has_parts(place) or not place.exists():
            assemble(place)
        remove_parts(place)
    return measured


def members_of(paths: Sequence[str]) -> list[Member]:
    """The models with their checkpoints, and for each one the first before it with its shapes.

    Raises  CheckpointError for a checkpoint whose step is unknown.
    """
    members: dict[tuple[str, str, str], Member] = {}
    for each in checkpoints_of(paths, "all"):
        if each.step is None:
            raise CheckpointError(
                f"{each.path} does not say its step; put it into a folder such as step1000"
            )
        key = (each.suite, each.model, each.variant)
        seed = None
        if each.run is not None:
            seed = start_seed_in(config_of_run(each.run))
        name = " ".join(filter(None, (each.model, each.variant)))
        member = members.setdefault(key, Member(name, seed))
        member.checkpoints[each.step] = each
    out = list(members.values())
    names = [member.name for member in out]
    for (suite, _, _), member in members.items():
        member.checkpoints = dict(sorted(member.checkpoints.items()))
        # Short names on the page, unless two suites have a model of one name.
        if names.count(member.name) > 1:
            member.name = f"{suite}/{member.name}"
    shapes: dict[tuple[Any, ...], Member] = {}
    for member in out:
        tensors = opened(member.checkpoints[member.first])
        shape = tuple((name, tensors.stored(name).shape) for name in sorted(tensors))
        first = shapes.setdefault(shape, member)
        # The first model of a shape is the one that the others are compared with.
        member.peer = None
        if first is not member:
            member.peer = first
    return out


def opened(checkpoint: Checkpoint) -> StoredTensors:
    """The weights of a checkpoint, not read yet. `castalia audit` compares the hashes of runs, not
    this."""
    saved = open_model(checkpoint.path, check=False)
    check_export(saved.folder)
    return saved.tensors


def identity_of(member: Member, step: int, spectra: bool) -> str:
    """What decides the rows of a checkpoint, as 16 hex digits."""
    own = member.checkpoints[step]
    facts: list[Any] = [member.name, step, own.weights_hash or own.path, spectra]
    # A comparison with other weights gives other rows of the same checkpoint.
    for word, other in member.compared(step).items():
        facts.append((word, other.model, other.step, other.weights_hash or other.path))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def rows_of(member: Member, step: int, spectra: bool, identity: str) -> Iterator[Row]:
    """The rows of one checkpoint: its tensors, its layers, and all of it."""
    tensors = opened(member.checkpoints[step])
    compared = member.compared(step)
    others = {word: opened(checkpoint) for word, checkpoint in compared.items()}
    peer = None
    if "peer" in compared and member.peer is not None:
        peer = member.peer.name
    shared = {
        "model": member.name,
        "seed": member.seed,
        "step": step,
        "start": member.first,
        "previous": member.before(step),
        "peer": peer,
        "identity": identity,
    }
    groups: dict[tuple[str, int | None], list[Together]] = {}
    matrices: list[Together] = []
    for name in tensors:
        tensor = tensors[name]
        # Buffers of indexes, as in old Hugging Face folders, are no weights.
        if not tensor.is_floating_point():
            continue
        for word, its in others.items():
            require_shape(name, tensor, its, own=member.checkpoints[step], other=compared[word])
        own = Together(sums_of(tensor), {w: between(tensor, o[name]) for w, o in others.items()})
        if tensor.dim() > 1:
            matrices.append(own)
        layer = layer_of(name)
        if layer is None:
            group = name.split(".")[0]
        else:
            group = f"layer {layer}"
        groups.setdefault((group, layer), []).append(own)
        row = shared | {"level": "tensor", "name": name, "layer": layer} | values_of([own])
        yield row | own_values(tensor, spectra)
    for (group, layer), parts in groups.items():
        yield shared | {"level": "layer", "name": group, "layer": layer} | values_of(parts)
    # By themselves: norms, which begin as ones, are alike in unrelated models.
    yield shared | {"level": "matrices", "name": "matrices", "layer": None} | values_of(matrices)
    every = [part for parts in groups.values() for part in parts]
    yield shared | {"level": "model", "name": "model", "layer": None} | values_of(every)


def require_shape(
    name: str, tensor: Tensor, others: StoredTensors, *, own: Checkpoint, other: Checkpoint
) -> None:
    """Raises  CheckpointError if what a checkpoint is compared with lacks a tensor of its shape."""
    shape = None
    if name in others:
        shape = tuple(others.stored(name).shape)
    if shape != tuple(tensor.shape):
        has = "lacks it"
        if shape is not None:
            has = f"has {list(shape)}"
        raise CheckpointError(
            f"{own.path} has {name} of shape {list(tensor.shape)}, and {other.path} {has}, so the"
            " two do not compare; `castalia audit` says which of the revisions is unlike the others"
        )


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name; None outside the layers."""
    found = LAYER.search(name)
    if found:
        return int(found[1])
    return None


def own_values(tensor: Tensor, spectra: bool) -> dict[str, Any]:
    """What does not add up over tensors: the median, and the spectrum of a matrix; of a stack of
    matrices, such as experts, the mean over the spectra of all."""
    values: dict[str, Any] = {"median": float(tensor.float().median())}
    if spectra and tensor.dim() == 3:
        # Side by side they would be one matrix of as many rows as there are experts.
        each = [spectrum(matrix) for matrix in tensor]
        values |= {name: fmean(one[name] for one in each) for name in each[0]}
    elif spectra and tensor.dim() > 1:
        values |= spectrum(tensor)
    return values


def values_of(parts: Sequence[Together]) -> dict[str, Any]:
    """The statistics of one or more tensors."""
    total = Sums()
    for part in parts:
        total += part.sums
    values = total.statistics()
    for word, (distance, cosine) in TRAVEL.items():
        both = summed(part.between[word] for part in parts if word in part.between)
        if both is not None:
            values[distance] = both.distance
            if cosine is not None:
                values[cosine] = both.cosine
    return values
