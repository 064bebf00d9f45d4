"""Which linear layers an adapter changes: roles and patterns of names. Needs no torch."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from castalia.core.errors import nearest
from castalia.models import ModelConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart

ALL = "all-linear"
"""Every linear layer of every block."""
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv"}
"""Roles that are one layer where the projections are fused."""


def part_of(name: str, parts: Iterable[LinearPart]) -> LinearPart | None:
    """The linear layer of a block that `layers.N.PLACE` names."""
    return next((part for part in parts if name.split(".", 2)[-1] == part.place), None)


def is_target(name: str, role: str | None, targets: Sequence[str]) -> bool:
    """Whether the linear layer `name` of a block is one of the targets.

    A pattern is of the whole name or of its end, from a dot on.
    """
    for target in targets:
        if target in (ALL, role) or (target == "qkv" and role in FUSED):
            return True
        if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}"):
            return True
    return False


def linear_names(model: ModelConfig) -> Iterator[tuple[str, LinearPart]]:
    """Names and parts of all linear layers of the blocks; none of a family without parts."""
    family = family_of(model)
    for layer in range(model.num_layers):
        parts = family.parts_at(model, layer)
        for part in () if parts is None else parts.linears:
            yield f"layers.{layer}.{part.place}", part


def names_all(model: ModelConfig) -> bool:
    """Whether `linear_names` has the linear layers of every block."""
    family = family_of(model)
    return all(family.parts_at(model, layer) for layer in range(model.num_layers))


def target_problems(targets: Sequence[str], rank: int, model: ModelConfig) -> list[str]:
    """Targets that no layer of the model has, and a rank that is larger than a targeted matrix."""
    known = list(linear_names(model))
    problems = []
    roles = list(dict.fromkeys(part.role for _, part in known))
    places = list(dict.fromkeys(part.place for _, part in known))
    # Other blocks have names alone; `adapt` sees their modules and judges there.
    for target in targets if names_all(model) else ():
        if any(is_target(name, part.role, [target]) for name, part in known):
            continue
        menu = ", ".join([ALL, *roles])
        also = ", ".join(["layers.N." + place for place in places])
        problems.append(
            f"adapter.targets: {target!r} matches no linear layer of a block; choose among {menu},"
            f" or patterns of {also}{nearest(target, [ALL, *roles, *places])}"
        )
    chosen = {part for name, part in known if is_target(name, part.role, targets)}
    problems += [
        f"adapter.rank {rank} is larger than the matrix of {part.role} ({part.outputs} x"
        f" {part.inputs}), which has no more than {min(part.outputs, part.inputs)}; lower the rank"
        " or leave it out of adapter.targets"
        for part in sorted(chosen)
        if rank > min(part.outputs, part.inputs)
    ]
    return problems
