"""The kind `mamba2`: a state space with one decay a head."""

from typing import TYPE_CHECKING, Any

from castalia.models.costs import Axes, Costs, Stored
from castalia.models.kinds.base import BlockKind
from castalia.models.kinds.mamba import ONLY_AT_START, norm_parameters
from castalia.models.model_config import BlocksConfig
from castalia.models.starts import ONES, LogUniform, Start, StepBias, Uniform, drawn
from castalia.recurrent.options import Mamba2Options

if TYPE_CHECKING:
    from castalia.models.block import Block


class Mamba2(BlockKind):
    """One layer of Mamba 2: norm, mixer, residual."""

    name = "mamba2"
    exact = True
    no_decay = ("*.ssm.A_log", "*.ssm.D")
    hidden = tuple(f"*.mixer.{name}.weight" for name in ("x", "z", "out"))

    def block(self, config: BlocksConfig, layer: int) -> "Block":
        """See `BlockKind`."""
        from castalia.models.parts.state_space_block import StateSpaceBlock
        from castalia.recurrent.mamba2 import Mamba2Mixer

        options = options_of(config)
        mixer = Mamba2Mixer(config.hidden_size, options, config.layernorm_epsilon)
        return StateSpaceBlock(config, mixer, options.channels(config.hidden_size))

    def starts(self, config: BlocksConfig) -> list[tuple[str, Start]]:
        """As the authors', mamba_ssm/modules/mamba2.py, with matrices as in the other families."""
        options = options_of(config)
        shape = (config.hidden_size, config.num_layers, config.init_method_std)
        return [
            ("*.mixer.ssm.A_log", LogUniform(1, 16)),
            ("*.mixer.ssm.D", ONES),
            ("*.mixer.ssm.dt_bias", StepBias(options.dt_min, options.dt_max, options.dt_floor)),
            ("*.mixer.conv_*", Uniform(options.conv_size**-0.5)),
            ("*.mixer.norm.weight", ONES),
            ("*.mixer.out.weight", drawn(config.output_layer_init_method, *shape)),
            ("*.mixer.*.weight", drawn(config.init_method, *shape)),
        ]

    def costs(self, config: BlocksConfig, layer: int) -> Costs:
        """See `BlockKind`."""
        options = options_of(config)
        d = config.hidden_size
        inner = options.channels(d)
        heads = options.heads(d)
        both = 2 * options.groups * options.state_size
        products = d * (3 * inner + both + heads)
        biases = options.bias * (2 * inner + both + heads + d)
        convolution = (options.conv_size + options.conv_bias) * (inner + both)
        norm = norm_parameters(config)
        chunk = min(options.chunk_size, options.CPU_CHUNK)
        parameters = products + biases + convolution + 3 * heads + inner + norm
        return Costs(
            parameters=parameters,
            active=parameters,
            products=products,
            flops_per_key=0,
            # Two halves, before and after the convolution, and the output of the norm; its input,
            # the time steps before and after their function, and the states between chunks.
            kept=Stored(
                residual=d,
                split=4 * inner + 2 * both,
                gathered=d,
                # All but the two halves.
                again_split=2 * inner + 2 * both,
                again_gathered=d,
                unfused=0 if "layernorm" in config.norm else d,
                exact=inner + 2 * heads + inner * options.state_size // chunk,
            ),
            tp_width=2 * d,
            whole_parameters=norm + options.bias * d,
        )

    def filled(self, config: BlocksConfig) -> dict[str, Any]:
        """See `BlockKind`."""
        options = options_of(config)
        sizes = {"inner_size": options.channels(config.hidden_size)}
        # A limit is a tuple in a config and a list in a file.
        shape = options.model_copy(update=sizes).model_dump(
            mode="json", exclude=ONLY_AT_START | {"chunk_size"}
        )
        return {self.name: shape}

    def problems(self, config: BlocksConfig) -> list[str]:
        """Heads and groups."""
        options = options_of(config)
        inner = options.channels(config.hidden_size)
        if inner % options.head_size:
            return [
                f"mamba2.inner_size {inner} is not divisible by mamba2.head_size"
                f" {options.head_size}"
            ]
        limit = options.dt_limit
        if limit is not None and limit[0] > limit[1]:
            return [f"mamba2.dt_limit {list(limit)} has its greatest step below its least"]
        heads = options.heads(config.hidden_size)
        if heads % options.groups:
            return [
                f"mamba2 has {heads} heads of {options.head_size} channels, which do not divide"
                f" into mamba2.groups {options.groups}"
            ]
        return []

    def divides(self, config: BlocksConfig, degrees: Axes) -> list[str]:
        """Heads and groups over tp."""
        tp = degrees.tp
        options = options_of(config)
        heads = options.heads(config.hidden_size)
        problems = []
        if heads % tp:
            problems.append(
                f"model.mamba2 has {heads} heads, which parallel.tp={tp} does not divide: a head"
                " stays whole on a rank"
            )
        if options.groups % tp and tp % options.groups:
            problems.append(
                f"model.mamba2.groups {options.groups} and parallel.tp={tp}: one must be a multiple"
                " of the other, since a rank's heads share whole groups"
            )
        return problems


def options_of(config: BlocksConfig) -> Mamba2Options:
    """The section, or its defaults."""
    return config.mamba2 or Mamba2Options()
