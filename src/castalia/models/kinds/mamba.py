"""The kind `mamba`: a selective state space."""

from typing import TYPE_CHECKING, Any

from castalia.models.costs import Axes, Costs, Stored
from castalia.models.kinds.base import BlockKind
from castalia.models.model_config import BlocksConfig
from castalia.models.starts import ONES, LogCount, Start, StepBias, Uniform, drawn
from castalia.recurrent.options import MambaOptions

if TYPE_CHECKING:
    from castalia.models.block import Block


ONLY_AT_START = {"dt_min", "dt_max", "dt_floor"}
"""Options of the section that the weights have in them."""


class Mamba(BlockKind):
    """One layer of Mamba: norm, mixer, residual."""

    name = "mamba"
    exact = True
    no_decay = ("*.ssm.A_log", "*.ssm.D")
    hidden = ("*.mixer.x.weight", "*.mixer.z.weight", "*.mixer.out.weight")

    def block(self, config: BlocksConfig, layer: int) -> "Block":
        """See `BlockKind`."""
        from castalia.models.parts.state_space_block import StateSpaceBlock
        from castalia.recurrent.mamba import MambaMixer

        options = options_of(config)
        mixer = MambaMixer(config.hidden_size, options)
        return StateSpaceBlock(config, mixer, options.channels(config.hidden_size))

    def starts(self, config: BlocksConfig) -> list[tuple[str, Start]]:
        """As GPT-NeoX, megatron/model/mamba/mamba.py."""
        options = options_of(config)
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        inner = drawn(config.init_method, *shape)
        return [
            ("*.mixer.ssm.A_log", LogCount()),
            ("*.mixer.ssm.D", ONES),
            ("*.mixer.dt_proj.bias", StepBias(options.dt_min, options.dt_max, options.dt_floor)),
            ("*.mixer.dt_proj.weight", Uniform(options.rank(config.hidden_size) ** -0.5)),
            # The convolution of torch, which GPT-NeoX leaves as it is.
            ("*.mixer.conv.*", Uniform(options.conv_size**-0.5)),
            ("*.mixer.out.weight", drawn(config.output_layer_init_method, *shape)),
            ("*.mixer.*.weight", inner),
        ]

    def costs(self, config: BlocksConfig, layer: int) -> Costs:
        """See `BlockKind`."""
        options = options_of(config)
        d = config.hidden_size
        inner = options.channels(d)
        rank = options.rank(d)
        n = options.state_size
        products = 3 * d * inner + inner * (rank + 2 * n) + rank * inner
        biases = options.bias * (2 * inner + d) + options.conv_bias * inner
        own = options.conv_size * inner + inner + n * inner + inner
        norm = norm_parameters(config)
        parameters = products + biases + own + norm
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            flops_per_key=0,
            # Two halves, before and after the convolution, gate and output; the time steps before
            # and after their function, and the states between chunks.
            kept=Stored(
                residual=d,
                split=6 * inner,
                gathered=d + rank + 2 * n,
                # All but the two halves.
                again_split=4 * inner,
                again_gathered=d + rank + 2 * n,
                unfused=0 if "layernorm" in config.norm else d,
                exact=2 * inner + inner * n // options.CHUNK,
            ),
            tp_width=2 * d,
            whole_parameters=norm + options.bias * d,
        )

    def filled(self, config: BlocksConfig) -> dict[str, Any]:
        """See `BlockKind`."""
        options = options_of(config)
        sizes = {
            "inner_size": options.channels(config.hidden_size),
            "dt_rank": options.rank(config.hidden_size),
        }
        return {self.name: options.model_copy(update=sizes).model_dump(exclude=ONLY_AT_START)}

    def divides(self, config: BlocksConfig, degrees: Axes) -> list[str]:
        """Channels over tp."""
        inner = options_of(config).channels(config.hidden_size)
        if inner % degrees.tp == 0:
            return []
        return [
            f"model.mamba.inner_size {inner} is not divisible by parallel.tp={degrees.tp}: each"
            " rank holds an equal part of the channels"
        ]


def options_of(config: BlocksConfig) -> MambaOptions:
    """The section, or its defaults."""
    return config.mamba or MambaOptions()


def norm_parameters(config: BlocksConfig) -> int:
    """Parameters of a norm of the residual stream."""
    if config.norm == "scalenorm":
        return 1
    each = {"layernorm": 2, "rmsnorm": 1, "non_parametric_layernorm": 0}
    return each[config.norm] * config.hidden_size
