"""Key-map rules of a transformer block, from what the family declares of its parts and a format's
names."""

from collections.abc import Mapping
from functools import partial

from castalia.checkpoint.keymap import Rule, Transform
from castalia.core.errors import ConfigError
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart, Parts
from castalia.models.parts.qkv import heads_apart, heads_together


def parts_of(config: TransformerConfig, names: Mapping[str, str], reader: str) -> Parts:
    """The parts of a block, each of which `names` must know by its role.

    Raises  ConfigError naming `reader` if it lacks a part, or the family declares none.
    """
    parts = family_of(config).parts(config)
    if parts is None:
        raise ConfigError(f"{reader} does not know the blocks of model.family {config.family}")
    roles = {part.role for part in parts.linears} | {part.role for part in parts.norms}
    if unknown := roles - names.keys():
        raise ConfigError(
            f"{reader} has no place for the {', '.join(sorted(unknown))}"
            f" of model.family {config.family}"
        )
    return parts


def linear_rules(parts: Parts, names: Mapping[str, str], theirs: str) -> list[Rule]:
    """Rules of the linear layers; `theirs` is a pattern such as 'blk.{{i}}.{name}.{kind}'."""
    rules = []
    # The braces of {i} stay for KeyMap, which fills in the layers.
    for part in parts.linears:
        kinds = ["weight"]
        if part.bias:
            kinds.append("bias")
        for kind in kinds:
            place = theirs.format(name=names[part.role], kind=kind)
            rules.append(Rule(f"layers.{{i}}.{part.place}.{kind}", place, row_order(part)))
    return rules


def norm_rules(ours: str, theirs: str, kinds: tuple[str, str]) -> list[Rule]:
    """The two rules of a LayerNorm; `kinds` are the format's words for weight and bias."""
    weight, bias = kinds
    return [Rule(f"{ours}.weight", theirs + weight), Rule(f"{ours}.bias", theirs + bias)]


def row_order(part: LinearPart) -> Transform:
    """Other libraries keep queries, keys and values apart; GPT-NeoX fuses them head by head."""
    if not part.fused_heads:
        return Transform()
    return Transform(
        partial(heads_apart, heads=part.fused_heads),
        partial(heads_together, heads=part.fused_heads),
    )
