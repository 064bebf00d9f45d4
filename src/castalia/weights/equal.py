"""Revisions that have weights in common, found through hashes in one pass over all of them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from castalia.weights.findings import Finding
from castalia.weights.measured import Checkpoint, distances, stacked
from castalia.weights.order import Distances, rightful
from castalia.weights.series import Revision, Series
from castalia.weights.still import Stillness

NAMED = 3
"""Names of tensors that a sentence has, of many."""


class Model(NamedTuple):
    """A model of which every revision was read."""

    series: Series
    revisions: list[Revision]
    """Those that could be read, ascending by step."""
    checkpoints: list[Checkpoint]
    """Their tensors."""
    still: Stillness

    def place(self, number: int) -> str:
        """Where a revision lies."""
        return str(self.revisions[number].folder)


class Shared(NamedTuple):
    """Tensors that several revisions have in common."""

    members: tuple[int, ...]
    names: list[str]


def identity(checkpoint: Checkpoint) -> tuple[tuple[str, str], ...]:
    """What two revisions with equal weights have in common."""
    return tuple(sorted((name, tensor.digest) for name, tensor in checkpoint.items()))


def same_weights(model: Model) -> tuple[list[Finding], list[int]]:
    """Revisions with equal tensors; and one revision for each set of weights, ascending: that whose
    weights they are, as far as their neighbours tell."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for number, checkpoint in enumerate(model.checkpoints):
        groups[identity(checkpoint)].append(number)
    table = distances(stacked(model.checkpoints, names_of(model.checkpoints)))
    findings: list[Finding] = []
    kept: list[int] = []
    for members in groups.values():
        owner = members[0]
        # Under a learning rate of 0 equal weights are right, as at step 1 of Pythia.
        if len(members) > 1 and not may_be_equal(model, members):
            owner, known = owner_of(model, table, members)
            findings += equal_findings(model, members, owner, known)
        kept.append(owner)
        findings += main_findings(model, members)
    return findings, sorted(kept)


def main_findings(model: Model, members: Sequence[int]) -> Iterator[Finding]:
    """Whether `main` has the weights of a step that is not the last one."""
    last = max((each.step for each in model.revisions if each.step is not None), default=None)
    steps = [model.revisions[number].step for number in members]
    named = [step for step in steps if step is not None]
    # `main` is the revision without a step.
    if None in steps and named and last not in named:
        what = f"it has the weights of step {named[-1]}, and step {last} is the last one"
        yield Finding("order", model.place(members[steps.index(None)]), what)


def owner_of(
    model: Model, table: Distances, members: Sequence[int], places: Sequence[int] | None = None
) -> tuple[int, bool]:
    """The revision that equal weights belong to, and whether anything tells it from the others.

    Takes   table (N, N) distances between the revisions `places`; None for all of them.
    """
    if places is None:
        places = range(len(model.revisions))
    # `main` repeats a step, and has no claim of its own.
    with_step = [number for number in members if model.revisions[number].step is not None]
    claims = rightful(table, [places.index(number) for number in with_step or members])
    owners = [places[claim] for claim in claims]
    return owners[0], may_be_equal(model, owners)


def may_be_equal(model: Model, members: Sequence[int]) -> bool:
    """Whether the learning rate was 0 between all of some revisions."""
    first = model.revisions[members[0]]
    return all(model.still.allows(first, model.revisions[other]) for other in members[1:])


def equal_findings(
    model: Model, members: Sequence[int], owner: int, known: bool
) -> Iterator[Finding]:
    """A finding for each revision that serves the weights of another."""
    for number in members:
        if number == owner or model.revisions[number].step is None:
            continue
        count = len(model.checkpoints[number])
        whose = model.revisions[owner].name
        if model.still.allows(model.revisions[number], model.revisions[owner]):
            continue
        yield Finding(
            "same_weights",
            model.place(number),
            f"all {count} tensors equal those of {whose}, though the learning rate was not 0"
            f" between the two{doubt(known)}",
        )


def doubt(known: bool) -> str:
    """The end of a sentence about equal weights: nothing, if it is known whose they are."""
    if known:
        return ""
    return "; which of the two they belong to is unknown"


def names_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Names of all tensors of floats, sorted."""
    return sorted(
        {name for each in checkpoints for name, tensor in each.items() if tensor.sketch is not None}
    )


def constants(model: Model, kept: Sequence[int]) -> set[str]:
    """Tensors that no step changes: buffers, frozen weights, and those equal in all of three or
    more different revisions."""
    digests: dict[str, set[str]] = defaultdict(set)
    for number in kept:
        for name, tensor in model.checkpoints[number].items():
            digests[name].add(tensor.digest)
    config = model.still.config
    frozen = []
    if config is not None:
        frozen = config.train.frozen
    return {
        name
        for name, values in digests.items()
        if (len(values) == 1 and len(kept) > 2)
        or any(fnmatchcase(name, pattern) for pattern in frozen)
    }


def shared_tensors(model: Model, kept: Sequence[int]) -> list[Shared]:
    """Tensors that some of the `kept` revisions have in common, though training changes them.

    Only matrices are evidence: rounding to 16 bits may hide a small update of a bias or a norm from
    all its elements, and not from those of a matrix.
    """
    steady = constants(model, kept)
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number in kept:
        for name, tensor in model.checkpoints[number].items():
            if name not in steady:
                owners[name, tensor.digest].append(number)
    names: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for (name, _), members in owners.items():
        if len(members) > 1 and not may_be_equal(model, members):
            names[tuple(members)].append(name)
    return [
        Shared(members, sorted(common))
        for members, common in names.items()
        if any(model.checkpoints[members[0]][name].is_matrix for name in common)
    ]


def shared_findings(
    model: Model, kept: Sequence[int]
) -> tuple[list[Finding], set[tuple[int, str]]]:
    """Findings about shared tensors, and (revision, tensor) of those that are not its own."""
    steady = constants(model, kept)
    findings: list[Finding] = []
    foreign: set[tuple[int, str]] = set()
    for shared in shared_tensors(model, kept):
        table = distances(stacked([model.checkpoints[number] for number in kept], shared.names))
        owner, known = owner_of(model, table, shared.members, kept)
        for number in shared.members:
            if number != owner:
                foreign |= {(number, name) for name in shared.names}
                findings += sharing(model, number, owner, shared.names, steady, known)
    return findings, foreign


def sharing(
    model: Model, number: int, owner: int, names: Sequence[str], steady: set[str], known: bool
) -> list[Finding]:
    """Findings about one revision that has tensors of another: whole files, and the rest."""
    checkpoint = model.checkpoints[number]
    whose = model.revisions[owner].name
    tail = doubt(known)
    files: dict[str, set[str]] = defaultdict(set)
    for name, tensor in checkpoint.items():
        if name not in steady:
            files[tensor.file].add(name)
    findings: list[Finding] = []
    rest = set(names)
    for file, inside in files.items():
        # A model of one file would be a case of `same_weights`.
        if len(files) > 1 and inside <= set(names):
            rest -= inside
            findings.append(
                Finding(
                    "same_shard",
                    f"{model.place(number)}/{file}",
                    f"all {len(inside)} tensors of this file equal those of {whose}, and the other"
                    f" files do not{tail}",
                )
            )
    # Vectors alone are no evidence, see `shared_tensors`.
    if any(checkpoint[name].is_matrix for name in rest):
        named = sorted(rest)
        more = ""
        if len(named) > NAMED:
            more = f" and {len(named) - NAMED} more"
        findings.append(
            Finding(
                "same_tensors",
                model.place(number),
                f"{len(named)} of {len(checkpoint)} tensors equal those of {whose}:"
                f" {', '.join(named[:NAMED])}{more}{tail}",
            )
        )
    return findings
