"""`KeyMap`: one table of names per family of checkpoints, read in both directions.

    rules = [Rule("layers.{i}.norm1.weight", "gpt_neox.layers.{i}.input_layernorm.weight")]
    names = KeyMap("Hugging Face GPTNeoX", rules, layers=6)
    theirs = names.to_theirs(ours)
    ours = names.to_ours(theirs)

A key that no rule knows and a rule whose key is missing are errors that name it, on both sides.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from castalia.core.errors import CheckpointError, nearest

SHOWN_KEYS = 5
"""Keys that an error lists before it counts the rest."""


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


@dataclass(frozen=True)
class Rule:
    """One name of theirs, and one of ours or, with a `Join`, several.

    `{i}` in all of them stands for each layer's number.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform | Join = field(default_factory=Transform)
    aliases: tuple[str, ...] = ()
    """Other names of theirs that are read too; `theirs` is the one that is written."""

    def at(self, layer: int) -> "Rule":
        """The rule of one layer, `{i}` filled in."""
        aliases = tuple(name.replace("{i}", str(layer)) for name in self.aliases)
        names = tuple(name.replace("{i}", str(layer)) for name in self.names)
        ours = names[0] if isinstance(self.ours, str) else names
        return Rule(ours, self.theirs.replace("{i}", str(layer)), self.transform, aliases)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def pieces(self) -> dict[str, Transform]:
        """How each tensor of ours is made of theirs, by its name."""
        if isinstance(self.transform, Transform):
            (name,) = self.names
            return {name: self.transform}
        return {name: self.transform.part(place) for place, name in enumerate(self.names)}

    def joined(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        tensors = [ours[name] for name in self.names]
        if isinstance(self.transform, Transform):
            return self.transform.out(tensors[0])
        return self.transform.out(tensors)


class KeyMap:
    """The names of one family.

    `ignored` are regular expressions, matched whole, for keys of theirs that hold nothing to keep
    (old buffers).
    """

    def __init__(
        self, family: str, rules: Sequence[Rule], *, layers: int, ignored: Iterable[str] = ()
    ) -> None:
        self.family = family
        self.rules = [
            rule.at(i) for rule in rules for i in (range(layers) if "{i}" in rule.theirs else [0])
        ]
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
        return {
            name: transform.back(theirs[key])
            for key, rule in rules.items()
            for name, transform in rule.pieces().items()
        }

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
        wanted = [
            rule
            for rule in self.rules
            if rule.theirs in stored_as or not all(matches(name, optional) for name in rule.names)
        ]
        self.require_equal(
            f"the {self.family} checkpoint", stored_as, [rule.theirs for rule in wanted]
        )
        return {stored_as[rule.theirs]: rule for rule in wanted}

    def rename(self, name: str) -> str:
        """The name that is written for one of its aliases; any other name is returned as it is."""
        return next((rule.theirs for rule in self.rules if name in rule.aliases), name)

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
