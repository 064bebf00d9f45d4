"""The kind of layer `rwkv7`. Needs no torch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from castalia.models.costs import Costs, Stored
from castalia.models.kinds.rwkv import (
    ByChannel,
    Depth,
    RwkvKind,
    by_layer,
    head_problems,
    layers_of,
    share,
)
from castalia.models.starts import ZEROS, Constant, Orthogonal, Start, Uniform
from castalia.recurrent.options import CHUNK, Rwkv7Options

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.models.block import Block


class Rwkv7Kind(RwkvKind):
    """RWKV 7. Start values are those of RWKV-LM, RWKV-v7/train_temp/src/model.py."""

    name = "rwkv7"

    def carries(self, config: Any) -> int:
        """The values of the first layer, which all later ones mix with theirs."""
        return int(config.hidden_size)

    def sizes(self, config: Any) -> Rwkv7Options:
        """See `RwkvKind`."""
        return sizes(config)

    def block(self, config: Any, layer: int) -> "Block":
        """See `BlockKind`."""
        from castalia.models.parts.rwkv_block import Rwkv7Block

        return Rwkv7Block(config, layer, first=is_first(config, layer))

    def starts(self, config: Any) -> Sequence[tuple[str, Start]]:
        """See `BlockKind`."""
        d = config.hidden_size
        head_size = sizes(config).head_size

        def of_layer(depth: Depth) -> Iterator[tuple[str, Start]]:
            yield from mixes(depth)
            yield from vectors(depth, head_size)
            number = 1 - depth.down + 1 / config.num_layers
            yield "att.norm.weight", Constant(number**0.7)

        return [
            *by_layer(config, self.name, of_layer),
            ("*.att.*_in", ZEROS),
            ("*.att.*_out", Orthogonal(0.1)),
            ("*.att.receptance.weight", Uniform(0.5 * d**-0.5)),
            ("*.att.key.weight", Uniform(0.05 * d**-0.5)),
            ("*.att.value.weight", Uniform(0.5 * d**-0.5)),
            ("*.ffn.key.weight", Uniform(0.5 * d**-0.5)),
            # What leads back into the stream adds nothing at first.
            ("*.att.output.weight", ZEROS),
            ("*.ffn.value.weight", ZEROS),
        ]

    def costs(self, config: Any, layer: int) -> Costs:
        """See `BlockKind`."""
        options = sizes(config)
        d = config.hidden_size
        f = options.ffn(d)
        ranks = options.ranks(d)
        first = is_first(config, layer)
        low = ranks.decay + ranks.rate + ranks.gate + (0 if first else ranks.value)
        products = 2 * low * d + 4 * d * d + 2 * d * f
        # Six mixes of time and one of channels; decay, rate, two of the keys, bonus; the norm of
        # the heads and two more; the mix of values.
        numbers = (7 + 5 + 6 + (0 if first else 1)) * d
        norm0 = 2 * d if layer == 0 else 0
        parameters = products + numbers + norm0
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            # Two reads, two writes and the decay: 5 multiply-adds for each number of the state,
            # three times with the backward.
            flops_per_key=30 * d * options.head_size,
            window=1,
            kept=kept_numbers(options, d, low),
            whole_parameters=parameters,
        )

    def problems(self, config: Any) -> list[str]:
        """See `BlockKind`."""
        return head_problems(self.name, config.hidden_size, sizes(config).head_size)


def sizes(config: Any) -> Rwkv7Options:
    """The section, or its defaults."""
    return config.rwkv7 or Rwkv7Options()


def is_first(config: Any, layer: int) -> bool:
    """Whether a layer is the model's first of this kind."""
    return layer == layers_of(config, Rwkv7Kind.name)[0]


def mixes(depth: Depth) -> Iterator[tuple[str, Start]]:
    """Mixes with the token before."""
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    for name, power in powers.items():
        yield f"att.mix_{name}", depth.mix(power)
    # down ** 4 is the exponent.
    yield "ffn.mix_k", Depth(depth.up, depth.down**4).mix(1.0)


def vectors(depth: Depth, head_size: int) -> Iterator[tuple[str, Start]]:
    """Decays, rates and factors, which depend on the channel alone."""
    half = max(1.0, (head_size - 1) / 2)

    def zigzag(n: "Tensor") -> "Tensor":
        place = (n % head_size - (head_size - 1) / 2) / half
        squared: Tensor = place * place.abs()
        return squared

    def decay(n: "Tensor") -> "Tensor":
        slope: Tensor = share(n) ** (1 + depth.up**0.3)
        return -6 + 6 * slope + 0.5 + 2.5 * zigzag(n)

    def rate(n: "Tensor") -> "Tensor":
        return -0.19 + 0.3 * zigzag(n) + 0.4 * (share(n) - 0.5)

    yield "att.decay", ByChannel(decay)
    yield "att.rate", ByChannel(rate)
    yield "att.value_mix", ByChannel(lambda n: 0.73 - 0.4 * (share(n) - 0.5))
    yield "att.key_scale", ByChannel(lambda n: 0.71 - 0.1 * (share(n) - 0.5))
    yield "att.key_rate", Constant(1.02)
    yield "att.bonus", Constant(-0.04)


def kept_numbers(options: Rwkv7Options, d: int, low: int) -> Stored:
    """What a block keeps of each token for the backward pass, counted off what autograd saves."""
    f = options.ffn(d)
    heads = d // options.head_size
    # Of the chunks: four products of pairs and the solution of each head, and two states.
    chunks = 5 * CHUNK * heads + 2 * d * options.head_size // CHUNK
    # Inputs of matrices.
    split = 7 * d + 2 * f + low
    return Stored(
        residual=d,
        split=split,
        gathered=0,
        # Selective recompute keeps what the widest matrix makes.
        again_split=split - f,
        exact=41 * d + chunks,
    )
