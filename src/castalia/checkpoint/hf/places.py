"""Names of an architecture's tensors as data, and the rules that follow from a family's parts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from castalia.checkpoint.keymap import Join, Rule, Transform
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart

JOINED = ("q", "k", "v")
"""Roles that some architectures have in one matrix."""


class Places(NamedTuple):
    """Where an architecture keeps its tensors."""

    base: str
    """Prefix of the model without its head; folders of that model alone lack it."""
    embedding: str
    final_norm: str
    block: str
    """A block, with {i} for its number."""
    parts: Mapping[str, str]
    """Modules of a block, by the roles of castalia.models.families.base. `qkv` is the one matrix
    of queries, keys and values, where there is one."""
    positions: str = ""
    """Learned positions."""
    heads: tuple[str, ...] = ("lm_head.weight",)
    """The output head: the name that is written, and others that are read."""


def rules_of(
    config: TransformerConfig, places: Places, weights: Transform, join: Join | None
) -> list[Rule]:
    """The rules of everything but the head.

    weights  how the matrices of the blocks change.
    join     how queries, keys and values make one matrix; None if they stay apart, or are one
             matrix with us, too.
    """
    parts = family_of(config).parts(config)
    assert parts is not None, "lacks was not asked"
    rules = [rule(places, "embed.weight", f"{places.embedding}.weight")]
    if config.pos_emb == "learned":
        rules.append(rule(places, "positions.weight", f"{places.positions}.weight"))
    for kind in parts.final_norm.kinds:
        rules.append(rule(places, f"norm.{kind}", f"{places.final_norm}.{kind}"))
    for norm in parts.norms:
        for kind in norm.kinds:
            place = f"{places.block}.{places.parts[norm.role]}.{kind}"
            rules.append(rule(places, f"layers.{{i}}.{norm.place}.{kind}", place))
    for linear in parts.linears:
        layers = layers_of(linear, config)
        if layers == () or (join is not None and linear.role in JOINED):
            continue
        for kind in kinds_of(linear):
            place = f"{places.block}.{places.parts[linear.role]}.{kind}"
            how = weights if kind == "weight" else Transform()
            ours = f"layers.{{i}}.{linear.place}.{kind}"
            rules.append(rule(places, ours, place, how, layers=layers))
    if join is not None:
        apart = [linear for linear in parts.linears if linear.role in JOINED]
        rules += joined_rules(apart, places, weights, join)
    return rules


def joined_rules(
    linears: Sequence[LinearPart], places: Places, weights: Transform, join: Join
) -> Iterator[Rule]:
    """The rules of queries, keys and values as one matrix."""
    for kind in kinds_of(linears[0]):
        ours = tuple(f"layers.{{i}}.{linear.place}.{kind}" for linear in linears)
        place = f"{places.block}.{places.parts['qkv']}.{kind}"
        yield rule(places, ours, place, after(join, weights) if kind == "weight" else join)


def rule(
    places: Places,
    ours: str | tuple[str, ...],
    place: str,
    transform: Transform | Join | None = None,
    *,
    others: Sequence[str] = (),
    layers: tuple[int, ...] | None = None,
    rows: int = 0,
) -> Rule:
    """A rule that also reads the names in a folder of the model without its head.

    others  places that are read, too. layers, rows: see `Rule`.
    """
    aliases = (place, *others, *(f"{places.base}.{other}" for other in others))
    how = transform or Transform()
    return Rule(ours, f"{places.base}.{place}", how, aliases, layers=layers, rows=rows)


def layers_of(linear: LinearPart, config: TransformerConfig) -> tuple[int, ...] | None:
    """The layers that have a linear layer; None means all. Experts stand in the place of an
    MLP."""
    if config.moe is None or not linear.role.startswith("mlp_"):
        return None
    return tuple(i for i in range(config.num_layers) if not config.has_experts(i))


def kinds_of(linear: LinearPart) -> Iterator[str]:
    """Names of a linear layer's parameters."""
    yield "weight"
    if linear.bias:
        yield "bias"


def after(join: Join, weights: Transform) -> Join:
    """The join with its one matrix changed by `weights`."""
    return Join(
        lambda ours: weights.out(join.out(ours)), lambda theirs: join.back(weights.back(theirs))
    )
