"""The kind of layer `rwkv6`. Needs no torch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from castalia.models.costs import Costs, Stored
from castalia.models.kinds.rwkv import (
    ByChannel,
    Depth,
    RwkvKind,
    by_layer,
    head_problems,
    share,
)
from castalia.models.starts import Start, Uniform
from castalia.recurrent.options import CHUNK, MIXES, Rwkv6Options

if TYPE_CHECKING:
    from torch import Tensor

    from castalia.models.block import Block


LOW_RANK = ("mix_in", "mix_out", "decay_in", "decay_out")


class Rwkv6Kind(RwkvKind):
    """RWKV 6. Start values are GPT-NeoX's, megatron/model/rwkv/v6/rwkv.py."""

    name = "rwkv6"

    def sizes(self, config: Any) -> Rwkv6Options:
        """See `RwkvKind`."""
        return sizes(config)

    def block(self, config: Any, layer: int) -> "Block":
        """See `BlockKind`."""
        from castalia.models.parts.rwkv_block import Rwkv6Block

        return Rwkv6Block(config, layer)

    def starts(self, config: Any) -> Sequence[tuple[str, Start]]:
        """See `BlockKind`."""
        options = sizes(config)
        d = config.hidden_size
        # torch's own start of a Linear: uniform within one over the root of the inputs.
        inner = options.inner(d)
        width = Uniform(d**-0.5)

        matrices = (
            "att.receptance",
            "att.key",
            "att.value",
            "att.gate",
            "ffn.receptance",
            "ffn.key",
        )
        return [
            *by_layer(config, self.name, mixes),
            *((f"*.att.{name}", Uniform(1e-4)) for name in LOW_RANK),
            ("*.att.output.weight", Uniform(inner**-0.5)),
            ("*.ffn.value.weight", Uniform(options.ffn(d) ** -0.5)),
            *((f"*.{name}.weight", width) for name in matrices),
        ]

    def costs(self, config: Any, layer: int) -> Costs:
        """See `BlockKind`."""
        options = sizes(config)
        d = config.hidden_size
        inner = options.inner(d)
        f = options.ffn(d)
        ranks = options.ranks(d)
        low = 2 * MIXES * ranks.mix * d + ranks.decay * (d + inner)
        products = low + 5 * d * inner + 2 * d * f + d * d
        # Six mixes of time and two of channels; decay, bonus and the norm of the heads; two norms.
        vectors = 8 * d + 4 * inner + 4 * d
        first = 2 * d if layer == 0 else 0
        parameters = products + vectors + first
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            # Writing to the state, decaying it and reading it: 3 multiply-adds for each of its
            # numbers, three times with the backward. Source  GPT-NeoX, megatron/logging.py.
            flops_per_key=18 * inner * options.head_size,
            window=1,
            kept=kept_numbers(options, d),
            whole_parameters=parameters,
        )

    def problems(self, config: Any) -> list[str]:
        """See `BlockKind`."""
        options = sizes(config)
        return head_problems(self.name, options.inner(config.hidden_size), options.head_size)


def sizes(config: Any) -> Rwkv6Options:
    """The section, or its defaults."""
    return config.rwkv6 or Rwkv6Options()


def mixes(depth: Depth) -> Iterator[tuple[str, Start]]:
    """Mixes with the token before, decays and bonuses, which depend on the channel alone."""
    for name in ("mix_x", "mix_w", "mix_k"):
        yield f"att.{name}", depth.mix(1.0)
    yield "att.mix_v", depth.mix(1.0, less=0.3 * depth.up)
    for name in ("mix_r", "mix_g"):
        yield f"att.{name}", depth.mix(0.5)
    for name in ("mix_k", "mix_r"):
        yield f"ffn.{name}", depth.mix(1.0)

    def bonus(n: "Tensor") -> "Tensor":
        return depth.up * (1 - share(n)) + ((n + 1) % 3 - 1) * 0.1

    yield "att.decay", ByChannel(lambda n: -6 + 5 * share(n) ** (0.7 + 1.3 * depth.up))
    yield "att.bonus", ByChannel(bonus)


def kept_numbers(options: Rwkv6Options, d: int) -> Stored:
    """What a block keeps of each token for the backward pass, counted off what autograd saves."""
    inner = options.inner(d)
    f = options.ffn(d)
    ranks = options.ranks(d)
    heads = inner // options.head_size
    # Of the chunks: the scores of each head, and the state before each and what is written to it.
    chunks = CHUNK * heads + 2 * inner * options.head_size // CHUNK
    # Inputs of matrices and what gates are made of.
    split = 10 * d + 4 * inner + 2 * f + MIXES * ranks.mix + ranks.decay
    return Stored(
        residual=d,
        split=split,
        gathered=0,
        # Selective recompute keeps what the widest matrix makes.
        again_split=split - f,
        exact=8 * d + 21 * inner + chunks,
    )
