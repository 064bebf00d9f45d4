"""gMLP, whose layers mix tokens by a matrix over positions, and aMLP, which adds attention."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from castalia.models.costs import Axes, Costs, Stored
from castalia.models.gating import GmlpOptions
from castalia.models.kinds.base import BlockKind
from castalia.models.starts import ONES, ZEROS, Start, drawn

if TYPE_CHECKING:
    from castalia.models.block import Block


class Gmlp(BlockKind):
    """A gate that sums over earlier tokens with a weight for each pair of positions."""

    name = "gmlp"
    hidden = (
        "layers.*.gating.up.weight",
        "layers.*.gating.gate.weight",
        "layers.*.gating.down.weight",
        # Of a width that is no model's, but its inputs grow with it, which is what counts.
        "layers.*.gating.attn.qkv.weight",
    )
    rewinds = True
    depends_on_length = True
    attends = False
    """Whether attention of one head is added to the gate."""

    def block(self, config: Any, layer: int) -> "Block":
        """See `BlockKind`."""
        from castalia.models.parts.gmlp_block import GmlpBlock

        return GmlpBlock(config, options_of(config), self.attends)

    def starts(self, config: Any) -> list[tuple[str, Start]]:
        """As GPT-NeoX: the gate begins as 1 for every token, whatever came before."""
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        return [
            ("*.gating.spatial.weight", ZEROS),
            ("*.gating.spatial.bias", ONES),
            ("*.gating.norm.weight", ONES),
            ("*.gating.*bias", ZEROS),
            ("*.gating.down.weight", drawn(config.output_layer_init_method, *shape)),
            ("*.gating.*.weight", drawn(config.init_method, *shape)),
        ]

    def costs(self, config: Any, layer: int) -> Costs:
        """See `BlockKind`."""
        from castalia.models.families.transformer import norm_part

        options = options_of(config)
        d = config.hidden_size
        f = inner_size(config)
        head = options.attention_size if self.attends else 0
        products = 3 * d * f + 7 * head * f
        length = config.max_position_embeddings
        spatial = length * length + length
        affine = {"layernorm": 2, "rmsnorm": 1}.get(config.norm, 0)
        norms = norm_part(config, "mlp_norm", "norm").parameters + affine * f
        # Of the attention, qkv has 3 biases a channel of the head, and out one a channel.
        small = 7 * head * f + (3 * head + f) * self.attends
        biases = options.bias * (2 * f + d)
        parameters = 3 * d * f + small + spatial + norms + biases
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            # One multiply-add a key and channel, three times with the backward; attention has two.
            flops_per_key=6 * f + 12 * head,
            # Kept: both projections and their activations, the gate normed, summed and multiplied.
            kept=Stored(
                residual=d,
                split=7 * f,
                gathered=d + 4 * head,
                again_split=2 * f,
                again_gathered=d,
            ),
            tp_width=2 * d,
            whole_parameters=small + spatial + norms,
        )

    def divides(self, config: Any, degrees: Axes) -> list[str]:
        """Channels over tp."""
        f = inner_size(config)
        if f % degrees.tp == 0:
            return []
        return [
            f"model.gmlp.inner_size {f} is not divisible by parallel.tp={degrees.tp}: each rank"
            " holds an equal part of the channels"
        ]

    def problems(self, config: Any) -> Iterator[str]:
        """Norms that the gate has none of."""
        if config.norm == "scalenorm":
            yield f"norm=scalenorm is not defined for the gate of {self.name}; use layernorm"
        if config.rmsnorm_partial is not None:
            yield f"rmsnorm_partial is not defined for the gate of {self.name}; remove it"


class Amlp(Gmlp):
    """gMLP with one narrow head of attention beside the matrix."""

    name = "amlp"
    attends = True


def options_of(config: Any) -> GmlpOptions:
    """The section, or its defaults."""
    options: GmlpOptions = config.gmlp or GmlpOptions()
    return options


def inner_size(config: Any) -> int:
    """Channels of the gate."""
    return options_of(config).inner_size or 4 * int(config.hidden_size)
