"""`KeyMap`: one table of names per family of checkpoints, read in both directions.

    rules = [Rule("layers.{i}.norm1.weight", "gpt_neox.layers.{i}.input_layernorm.weight")]
    names = KeyMap("Hugging Face GPTNeoX", rules, layers=6)
    theirs = names.to_theirs(ours)
    ours = names.to_ours(theirs)

A key that no rule knows and a rule whose key is missing are errors that name it, on both sides.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from castalia.core.errors import CheckpointError, nearest

SHOWN_KEYS = 5
"""Keys that an error lists before it counts the rest."""
Part = TypeVar("Part")
"""What a tensor of ours is made of: tensors, or places on a disk."""


@runtime_checkable
class HasRows(Protocol):
    """Tensors by name of which one row can be read without the others."""

    def row(self, name: str, number: int) -> Tensor:
        """`self[name][number]`."""


def unchanged(tensor: Tensor) -> Tensor:
    """The transform of a tensor that both sides store alike."""
    return tensor


@dataclass(frozen=True)
class Transform:
    """How a tensor changes on the way: `out` makes theirs from ours, `back` ours from theirs."""

    out: Callable[[Tensor], Tensor] = unchanged
    back: Callable[[Tensor], Tensor] = unchanged

    @property
    def copies(self) -> bool:
        """Whether ours is a plain copy of theirs, so that a part of one is the same part of the
        other."""
        return self.back is unchanged


@dataclass(frozen=True)
class Join:
    """How several tensors of ours make one of theirs, such as queries, keys and values."""

    out: Callable[[Sequence[Tensor]], Tensor]
    back: Callable[[Tensor], Sequence[Tensor]]

    def part(self, number: int) -> Transform:
        """How the one of ours at place `number` is made of theirs."""
        return Transform(back=lambda theirs: self.back(theirs)[number])


def rows_joined(sizes: Sequence[int]) -> Join:
    """Several matrices or vectors as one; `sizes` are their rows."""
    return Join(lambda ours: torch.cat(list(ours)), lambda theirs: theirs.split(list(sizes)))


@dataclass(frozen=True)
class Rule:
    """One name of theirs, and one of ours or, with a `Join`, several.

    `{i}` in all of them stands for the number of a layer, `{e}` in theirs for that of an expert:
    ours holds all experts in one tensor, of which each of theirs is a row.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform | Join = field(default_factory=Transform)
    aliases: tuple[str, ...] = ()
    """Other names of theirs that are read too; `theirs` is the one that is written."""
    layers: tuple[int, ...] | None = None
    """The layers that have it; null means all."""
    rows: int = 0
    """Experts of a rule with `{e}`."""
    row: int | None = None
    """The row of ours that theirs is, filled in by `at`; null means all of ours."""

    def at(self, layer: int) -> Iterator["Rule"]:
        """The rules of one layer, `{i}` and `{e}` filled in."""
        names = tuple(name.replace("{i}", str(layer)) for name in self.names)
        ours = names[0] if isinstance(self.ours, str) else names
        for row in range(self.rows) if self.rows else [None]:
            theirs, *aliases = (
                name.replace("{i}", str(layer)).replace("{e}", str(row))
                for name in (self.theirs, *self.aliases)
            )
            yield replace(self, ours=ours, theirs=theirs, aliases=tuple(aliases), row=row)

    def of_layers(self, count: int) -> Iterator["Rule"]:
        """The rules of all layers of a model of `count`, or this one alone."""
        if "{i}" not in self.theirs:
            yield from self.at(0)
            return
        for layer in range(count) if self.layers is None else self.layers:
            yield from self.at(layer)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def pieces(self) -> dict[str, Transform]:
        """How each tensor of ours, or a row of it, is made of theirs, by its name."""
        if isinstance(self.transform, Transform):
            (name,) = self.names
            return {name: self.transform}
        return {name: self.transform.part(place) for place, name in enumerate(self.names)}

    def joined(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        tensors = [self.part_of(ours, name) for name in self.names]
        if isinstance(self.transform, Transform):
            return self.transform.out(tensors[0])
        return self.transform.out(tensors)

    def part_of(self, ours: Mapping[str, Tensor], name: str) -> Tensor:
        """The tensor of ours that is theirs, or its row."""
        if self.row is None:
            return ours[name]
        # All experts of a layer may not fit where one does.
        return ours.row(name, self.row) if isinstance(ours, HasRows) else ours[name][self.row]


def gathered(
    rules: Mapping[str, Rule],
    make: Callable[[str, Transform], Part],
    stack: Callable[[list[Part]], Part],
) -> dict[str, Part]:
    """Our tensors by name, out of theirs.

    Takes   rules: of their keys, as `KeyMap.rules_for` returns them. make: ours, or a row of it,
            of one key. stack: ours of all its rows in order.
    """
    out: dict[str, Part] = {}
    rows: dict[str, dict[int, Part]] = {}
    for key, rule in rules.items():
        for name, transform in rule.pieces().items():
            part = make(key, transform)
            if rule.row is None:
                out[name] = part
            else:
                rows.setdefault(name, {})[rule.row] = part
    return out | {name: stack([of[i] for i in sorted(of)]) for name, of in rows.items()}


class KeyMap:
    """The names of one family.

    `ignored` are regular expressions, matched whole, for keys of theirs that hold nothing to keep
    (old buffers).
    """

    def __init__(
        self, family: str, rules: Sequence[Rule], *, layers: int, ignored: Iterable[str] = ()
    ) -> None:
        self.family = family
        self.rules = [one for rule in rules for one in rule.of_layers(layers)]
        self.written = {alias: rule.theirs for rule in self.rules for alias in rule.aliases}
        """Their name that is written, by each of its aliases."""
        self.ignored = [re.compile(pattern) for pattern in ignored]

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their names and layout for our tensors.

        Raises  CheckpointError naming our keys that no rule knows, or that a rule wants and are
                missing.
        """
        self.require_equal("our model", ours, [name for rule in self.rules for name in rule.names])
        return {rule.theirs: rule.joined(ours) for rule in self.rules}

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names and layout for their tensors.

        Raises  CheckpointError naming their keys that no rule knows, or that a rule wants and are
                missing.
        """
        rules = self.rules_for(theirs)
        return gathered(rules, lambda key, how: how.back(theirs[key]), torch.stack)

    def rules_for(self, theirs: Iterable[str], optional: Collection[str] = ()) -> dict[str, Rule]:
        """The rule of each of their keys that holds something, in the order of the rules.

        `optional` are patterns (fnmatch) of our names that may be missing.
        Raises  CheckpointError naming their keys that no rule knows, or that a rule wants and are
                missing.
        """
        stored_as: dict[str, str] = {}
        for name in theirs:
            if self.is_ignored(name):
                continue
            renamed = self.rename(name)
            if renamed in stored_as:
                raise CheckpointError(
                    f"the {self.family} checkpoint has {renamed!r} twice, once as {name!r}"
                )
            stored_as[renamed] = name
        # Of experts that may be missing either all are, or one is lost.
        present = {n for rule in self.rules if rule.theirs in stored_as for n in rule.names}
        wanted = [
            rule
            for rule in self.rules
            if not present.isdisjoint(rule.names)
            or not all(matches(name, optional) for name in rule.names)
        ]
        self.require_equal(
            f"the {self.family} checkpoint", stored_as, [rule.theirs for rule in wanted]
        )
        return {stored_as[rule.theirs]: rule for rule in wanted}

    def rename(self, name: str) -> str:
        """The name that is written for one of its aliases; any other name is returned as it is."""
        return self.written.get(name, name)

    def is_ignored(self, name: str) -> bool:
        """Whether `name` is one of theirs that carries nothing."""
        return any(pattern.fullmatch(name) for pattern in self.ignored)

    def require_equal(self, side: str, have: Iterable[str], want: Sequence[str]) -> None:
        """Raises  CheckpointError if the keys of one side are not exactly those of the rules."""
        have = set(have)
        problems = []
        # Both sides exactly: a key that is dropped without a word is a model with other weights.
        extra = sorted(have - set(want))
        missing = sorted(set(want) - have)
        if extra:
            problems.append(f"keys that no rule knows: {shown(extra)}{nearest(extra[0], missing)}")
        if missing:
            problems.append(f"keys that are missing: {shown(missing)}")
        if problems:
            raise CheckpointError(
                f"{side} does not fit the {self.family} key map: {'; '.join(problems)};"
                " the config describes another model than the weights"
            )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` fits one of the patterns, as file names fit `*` and `?`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def shown(names: Sequence[str]) -> str:
    """A few names, quoted, and how many more there are."""
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(repr(name) for name in names[:SHOWN_KEYS]) + more
