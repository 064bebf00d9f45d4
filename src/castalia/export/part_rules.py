"""Key-map rules of a transformer block, from what the family declares of its parts and a format's
names."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from castalia.checkpoint.keymap import Rule, Transform, rows_joined
from castalia.core.errors import ConfigError
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of
from castalia.models.families.base import LinearPart, NormPart, Parts
from castalia.models.parts.positions import SinusoidalPositions
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


def linear_rules(
    parts: Parts,
    names: Mapping[str, str],
    theirs: str,
    order: Callable[[LinearPart], Transform] | None = None,
) -> list[Rule]:
    """Rules of the linear layers; `theirs` is a pattern such as 'blk.{{i}}.{name}.{kind}'.

    Layers that have the same name there are one matrix, their rows one after the other.
    order  how the rows of a layer change; by default `row_order`.
    """
    order = order or row_order
    by_name: dict[str, list[LinearPart]] = {}
    for part in parts.linears:
        by_name.setdefault(names[part.role], []).append(part)
    rules = []
    # The braces of {i} stay for KeyMap, which fills in the layers.
    for name, group in by_name.items():
        kinds = ["weight"]
        if group[0].bias:
            kinds.append("bias")
        for kind in kinds:
            place = theirs.format(name=name, kind=kind)
            ours = tuple(f"layers.{{i}}.{part.place}.{kind}" for part in group)
            if len(group) == 1:
                rules.append(Rule(ours[0], place, order(group[0])))
            else:
                rules.append(Rule(ours, place, rows_joined([part.outputs for part in group])))
    return rules


def norm_rules(norm: NormPart, theirs: str, kinds: Mapping[str, str]) -> list[Rule]:
    """Rules of a norm's parameters; `kinds` are the format's words for weight and bias.

    `theirs` has {i} if the norm stands in every layer.
    """
    if norm.role == "final_norm":
        ours = norm.place
    else:
        ours = f"layers.{{i}}.{norm.place}"
    return [Rule(f"{ours}.{kind}", theirs + kinds[kind]) for kind in norm.kinds]


def plain_norms(
    config: TransformerConfig, theirs: Mapping[str, str], kinds: Mapping[str, str]
) -> dict[str, Tensor]:
    """Ones and zeros for norms without parameters, where the format requires them.

    `theirs` are the format's patterns by the role of the norm.
    """
    parts = family_of(config).parts(config)
    assert parts is not None, "parts_of was not asked"
    made = {}
    if config.norm == "non_parametric_layernorm":
        for norm in (*parts.norms, parts.final_norm):
            for layer in range(config.num_layers):
                place = theirs[norm.role].replace("{i}", str(layer))
                made[place + kinds["weight"]] = torch.ones(norm.width)
                made[place + kinds["bias"]] = torch.zeros(norm.width)
    return made


def row_order(part: LinearPart) -> Transform:
    """Other libraries keep queries, keys and values apart; GPT-NeoX fuses them head by head."""
    if not part.fused_heads:
        return Transform()
    return Transform(
        partial(heads_apart, heads=part.fused_heads),
        partial(heads_together, heads=part.fused_heads),
    )


def added_positions(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The table of vectors that are added to the embedding, float (T, C); None if there is none.

    T is max_position_embeddings: other programs store the sines of sinusoidal positions as well.
    """
    if config.pos_emb == "learned":
        # A window that the program lacks has cut the longest text, and the table has all rows.
        rows = slice(config.learned_offset, config.learned_offset + config.max_position_embeddings)
        return tensors["positions.weight"][rows]
    if config.pos_emb == "sinusoidal":
        places = torch.arange(config.max_position_embeddings)
        table: Tensor = SinusoidalPositions(config.hidden_size)(places)
        return table
    return None
