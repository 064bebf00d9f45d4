"""Low-rank additions of an adapter as tensors, and their places in architectures of transformers.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from castalia.checkpoint.hf.format import TransformerFormat
from castalia.checkpoint.hf.formats import chosen_format
from castalia.checkpoint.hf.joins import by_key_head
from castalia.checkpoint.hf.mixtures import MixtureFormat
from castalia.checkpoint.hf.places import JOINED
from castalia.checkpoint.keymap import Join
from castalia.checkpoint.tensors import StoredTensor
from castalia.core.errors import ConfigError
from castalia.models import ModelConfig
from castalia.models.config import TransformerConfig
from castalia.models.families import family_of


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to a matrix: W + scale * B A, whose rows get the lengths m if there is a
    magnitude m."""

    down: Tensor
    """A (R, I)."""
    up: Tensor
    """B (O, R)."""
    scale: float
    magnitude: Tensor | None = None
    """m (O,)."""

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LowRank:
    """A stored matrix with an addition, in float32. A part reads what it needs and no more."""

    base: StoredTensor
    addition: Addition

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """The sum is rounded where it is stored, not here."""
        return torch.float32

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        rows, columns = part
        if self.addition.magnitude is None:
            return self.added(rows, columns)
        # A length is of the whole row.
        whole = self.added(rows, slice(0, self.shape[1]))
        factor = self.addition.magnitude[rows].float() / whole.square().sum(1).sqrt()
        return (whole * factor[:, None])[:, columns].contiguous()

    def added(self, rows: slice, columns: slice) -> Tensor:
        """A part of W + scale * B A."""
        product = self.addition.up[rows].float() @ self.addition.down[:, columns].float()
        return self.base[rows, columns].float() + self.addition.scale * product


class Modules(NamedTuple):
    """Linear layers of ours and of an architecture that hold the same rows: one and one, or several
    on one side that make one on the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Join | None


def module_map(model: ModelConfig) -> tuple[TransformerFormat, list[Modules]]:
    """The architecture that a model is written as, and the linear layers of its blocks there.

    Raises  ConfigError if transformers has no such model.
    """
    if not isinstance(model, TransformerConfig):
        raise ConfigError(f"no names of PEFT modules are known for model.family {model.family}")
    form = chosen_format(model)
    if not isinstance(form, TransformerFormat):
        raise ConfigError(f"no names of PEFT modules are known for {form.architectures[0]}")
    return form, [
        modules
        for layer in range(model.num_layers)
        for modules in modules_of_layer(model, form, layer)
    ]


def modules_of_layer(
    config: TransformerConfig, form: TransformerFormat, layer: int
) -> Iterator[Modules]:
    """The linear layers of one block."""
    places = form.layout(config)
    block = f"{places.base}.{places.block.replace('{i}', str(layer))}"
    parts = family_of(config).parts_at(config, layer)
    assert parts is not None, "a format has layers of attention alone"
    ours = {part.role: f"layers.{layer}.{part.place}" for part in parts.linears}

    def theirs(role: str) -> str:
        return f"{block}.{places.parts[role]}"

    # A fused matrix of ours is joined already.
    join = None
    if not config.fused_qkv:
        join = form.join(config)
    if config.fused_qkv and not form.fused:
        heads = by_key_head(config.num_attention_heads, config.num_attention_heads)
        yield Modules((ours.pop("qkv"),), tuple(theirs(role) for role in JOINED), heads)
    if join is not None:
        yield Modules(tuple(ours.pop(role) for role in JOINED), (theirs("qkv"),), join)
    for role, place in ours.items():
        yield Modules((place,), (theirs(role),), None)
    if config.has_experts(layer) and isinstance(form, MixtureFormat):
        # Experts are no linear layers, on neither side; the MLP beside them is.
        for own, there in form.experts.shared.items():
            place = f"layers.{layer}.mlp.{own.removesuffix('.weight')}"
            yield Modules((place,), (f"{block}.{there.removesuffix('.weight')}",), None)


Lengths = Callable[[str], Tensor]
"""Name of a layer -> lengths (O,) of the rows of its base matrix."""


def moved(
    additions: Mapping[str, Addition],
    groups: Sequence[tuple[tuple[str, ...], tuple[str, ...], Join | None]],
    lengths: Lengths,
    rows: Callable[[str], int],
) -> dict[str, Addition]:
    """Additions under other names; each group has names here, names there, and what joins them.

    lengths, rows   of a layer here that has no addition while its neighbours have.
    """
    out = {}
    for here, there, join in groups:
        present = [name for name in here if name in additions]
        if not present:
            continue
        if join is None:
            out[there[0]] = additions[here[0]]
        elif len(here) == 1:
            out.update(zip(there, split_rows(additions[here[0]], join), strict=True))
        else:
            out[there[0]] = joined_rows(additions, here, join, lengths, rows)
    return out


def split_rows(addition: Addition, join: Join) -> list[Addition]:
    """The additions of the layers that one layer is made of: A is that of all."""
    ups = join.back(addition.up)
    lengths: Sequence[Tensor | None] = [None] * len(ups)
    if addition.magnitude is not None:
        lengths = join.back(addition.magnitude)
    return [
        Addition(addition.down, up.contiguous(), addition.scale, length)
        for up, length in zip(ups, lengths, strict=True)
    ]


def joined_rows(
    additions: Mapping[str, Addition],
    names: Sequence[str],
    join: Join,
    lengths: Lengths,
    rows: Callable[[str], int],
) -> Addition:
    """The addition of the layer that several make: its rank is the sum of theirs, exactly."""
    known = [additions[name] for name in names if name in additions]
    rank = sum(addition.rank for addition in known)
    scale = known[0].scale
    ups = []
    magnitudes = []
    column = 0
    for name in names:
        addition = additions.get(name)
        up = torch.zeros(rows(name), rank)
        if addition is not None:
            last = column + addition.rank
            up[:, column:last] = addition.up.float() * (addition.scale / scale)
            column = last
        ups.append(up)
        if any(other.magnitude is not None for other in known):
            if addition is not None and addition.magnitude is not None:
                magnitudes.append(addition.magnitude.float())
            else:
                # A matrix that the adapter left alone keeps the lengths of its rows.
                magnitudes.append(lengths(name))
    down = torch.cat([addition.down.float() for addition in known])
    magnitude = None
    if magnitudes:
        magnitude = join.out(magnitudes).contiguous()
    return Addition(down, join.out(ups).contiguous(), scale, magnitude)


def to_theirs(
    additions: Mapping[str, Addition], model: ModelConfig, base: Mapping[str, Tensor]
) -> dict[str, Addition]:
    """Additions by the names of transformers' modules; `base` are our weights under them.

    Raises  ConfigError naming layers that transformers has no place for.
    """
    form, groups = module_map(model)
    known = {name for modules in groups for name in modules.ours}
    if unknown := sorted(set(additions) - known):
        raise ConfigError(
            f"{form.architectures[0]} has no linear layer for {', '.join(unknown[:3])}"
            f"{' and more' if len(unknown) > 3 else ''}; export the merged model with --to hf"
        )
    return moved(
        additions,
        [(ours, theirs, join) for ours, theirs, join in groups],
        lambda name: base[f"{name}.weight"].float().square().sum(1).sqrt(),
        lambda name: base[f"{name}.weight"].shape[0],
    )


def to_ours(
    additions: Mapping[str, Addition], model: ModelConfig, base: Mapping[str, Tensor]
) -> dict[str, Addition]:
    """Additions by our names, from those of transformers' modules.

    Raises  ConfigError naming modules that are no linear layers of the blocks.
    """
    form, groups = module_map(model)
    known = {name for modules in groups for name in modules.theirs}
    if unknown := sorted(set(additions) - known):
        kinds = sorted({name.rpartition(".")[2] for name in known})
        raise ConfigError(
            f"the adapter changes {', '.join(unknown[:3])}"
            f"{' and more' if len(unknown) > 3 else ''}, which Castalia cannot adapt; it adapts"
            f" {', '.join(kinds)} of {form.architectures[0]}"
        )
    whole: dict[str, Tensor] = {}

    def matrix(name: str) -> Tensor:
        # Three layers of theirs in one of ours: the rows of each by the same join.
        if name not in whole:
            group = next(modules for modules in groups if name in modules.theirs)
            assert group.join is not None
            parts = group.join.back(base[f"{group.ours[0]}.weight"])
            whole.update(zip(group.theirs, parts, strict=True))
        return whole[name]

    return moved(
        additions,
        [(theirs, ours, join) for ours, theirs, join in groups],
        lambda name: matrix(name).float().square().sum(1).sqrt(),
        lambda name: matrix(name).shape[0],
    )
