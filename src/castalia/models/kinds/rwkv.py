"""What the versions of RWKV declare alike: sizes, and start values that depend on the place. Needs
no torch."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from castalia.models.costs import Axes
from castalia.models.kinds.base import BlockKind
from castalia.models.starts import Start

if TYPE_CHECKING:
    from torch import Generator, Tensor

NO_DECAY = (
    "*.att.mix_*",
    "*.ffn.mix_*",
    "*.att.decay",
    "*.att.decay_in",
    "*.att.decay_out",
    "*.att.bonus",
    "*.att.rate",
    "*.att.rate_in",
    "*.att.rate_out",
    "*.att.value_mix",
    "*.att.value_in",
    "*.att.value_out",
    "*.att.gate_in",
    "*.att.gate_out",
    "*.att.key_scale",
    "*.att.key_rate",
)
"""Everything but the matrices between two widths. Source  RWKV-LM, RWKV-v7/train_temp/src/model.py,
configure_optimizers. GPT-NeoX decays these too, which pulls its decays towards exp(-1)."""
MATRICES = (
    "att.receptance",
    "att.key",
    "att.value",
    "att.gate",
    "att.output",
    "ffn.receptance",
    "ffn.key",
    "ffn.value",
)
"""The matrices between two widths, of both versions."""


class RwkvKind(BlockKind):
    """What both versions declare alike."""

    no_decay = NO_DECAY
    hidden = tuple(f"*.{place}.weight" for place in MATRICES)
    exact = True

    @abstractmethod
    def sizes(self, config: Any) -> Any:
        """The section, or its defaults."""

    def filled(self, config: Any) -> dict[str, Any]:
        """See `BlockKind`."""
        section = self.sizes(config).complete(config.hidden_size)
        return {self.name: section.model_dump(mode="json")}

    def divides(self, config: Any, degrees: Axes) -> list[str]:
        """See `BlockKind`."""
        if degrees.tp == 1:
            return []
        return [
            f"layers of {self.name} are not split over parallel.tp={degrees.tp}: each token is"
            " mixed with the one before it, which another rank may hold; set parallel.tp=1 and use"
            " parallel.dp_shard or parallel.pp"
        ]


@dataclass(frozen=True)
class ByChannel:
    """A function of the channels 0, 1, … (float32) of a parameter, which draws nothing."""

    function: "Callable[[Tensor], Tensor]"

    def __call__(self, shape: tuple[int, ...], generator: "Generator") -> "Tensor":
        """Fill a tensor, row after row."""
        import math

        import torch

        count = math.prod(shape)
        return self.function(torch.arange(count, dtype=torch.float32)).reshape(shape)


def share(n: "Tensor") -> "Tensor":
    """Channels as shares of the last one, 0 to 1."""
    return n / max(1, len(n) - 1)


@dataclass(frozen=True)
class Depth:
    """Where a layer lies: `up` goes from 0 in the first layer to 1 in the last, `down` from 1
    towards 0."""

    up: float
    down: float

    @classmethod
    def of(cls, layer: int, layers: int) -> "Depth":
        """Of layer `layer` of `layers`."""
        return cls(layer / max(1, layers - 1), 1 - layer / layers)

    def mix(self, power: float, less: float = 0.0) -> ByChannel:
        """How much of a token itself enters a mix, 1 - (c / C) ** (power * down) - less."""
        exponent = power * self.down
        return ByChannel(lambda n: 1 - (n / len(n)) ** exponent - less)


def layers_of(config: Any, kind: str) -> list[int]:
    """The places of the layers of a kind: all of a model whose family it is."""
    if config.family == kind:
        return list(range(config.num_layers))
    return [layer for layer in range(config.num_layers) if config.block_kind(layer) == kind]


def by_layer(
    config: Any, kind: str, starts: Callable[[Depth], Iterator[tuple[str, Start]]]
) -> Iterator[tuple[str, Start]]:
    """The start values of each layer of a kind, their names with the layer's place before them."""
    for layer in layers_of(config, kind):
        for name, start in starts(Depth.of(layer, config.num_layers)):
            yield f"layers.{layer}.{name}", start


def head_problems(kind: str, size: int, head_size: int) -> list[str]:
    """Why the heads do not divide the channels; an empty list if they do."""
    if size % head_size == 0:
        return []
    return [
        f"{kind}.head_size {head_size} does not divide the {size} channels of the time mixing; set"
        f" another {kind}.head_size"
    ]
