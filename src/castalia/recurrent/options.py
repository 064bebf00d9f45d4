"""Sections of `model` for layers with a recurrence. Needs no torch."""

from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from castalia.config.base import Config


class MambaOptions(Config):
    """A selective state space; Gu and Dao 2023, arXiv:2312.00752."""

    state_size: PositiveInt = 16
    """Numbers that each channel remembers."""
    conv_size: PositiveInt = 4
    """Tokens that the causal convolution before the scan sees, the token itself included."""
    inner_size: PositiveInt | None = None
    """Channels of the scan; null means 2 * hidden_size."""
    dt_rank: PositiveInt | None = None
    """Rank of the matrix that makes the time steps; null means hidden_size / 16, rounded up."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Biases of the projections into and out of the layer."""
    dt_min: PositiveFloat = 1e-3
    """Least time step at the start."""
    dt_max: PositiveFloat = 0.1
    """Greatest time step at the start."""
    dt_floor: PositiveFloat = 1e-4
    """Time steps at the start are not below."""

    CHUNK: ClassVar[int] = 32
    """Tokens between two states that are kept for the backward."""

    def channels(self, width: int) -> int:
        """Channels of the scan in a model of this width."""
        return self.inner_size or 2 * width

    def rank(self, width: int) -> int:
        """Rank of the time steps."""
        return self.dt_rank or -(-width // 16)


class Mamba2Options(Config):
    """A state space with one decay a head; Dao and Gu 2024, arXiv:2405.21060."""

    state_size: PositiveInt = 128
    """Numbers that each channel remembers."""
    conv_size: PositiveInt = 4
    """Tokens that the causal convolution before the scan sees, the token itself included."""
    inner_size: PositiveInt | None = None
    """Channels of the scan; null means 2 * hidden_size."""
    head_size: PositiveInt = 64
    """Channels of a head, which share a decay."""
    groups: PositiveInt = 1
    """Groups of heads that share the vectors which write to the state and read from it."""
    chunk_size: PositiveInt = 256
    """Tokens of a chunk of the scan; a matter of speed alone. A CPU takes 128 at most."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Biases of the projections into and out of the layer."""
    dt_min: PositiveFloat = 1e-3
    """Least time step at the start."""
    dt_max: PositiveFloat = 0.1
    """Greatest time step at the start."""
    dt_floor: PositiveFloat = 1e-4
    """Time steps at the start are not below."""
    dt_limit: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """Least and greatest time step at any time; null bounds none."""

    CPU_CHUNK: ClassVar[int] = 128
    """Products large enough for a core's kernels, squares that stay in its cache."""

    def channels(self, width: int) -> int:
        """Channels of the scan in a model of this width."""
        return self.inner_size or 2 * width

    def heads(self, width: int) -> int:
        """Heads of these channels."""
        return self.channels(width) // self.head_size


class Rwkv6Options(Config):
    """RWKV 6, Finch; Peng et al. 2024, arXiv:2404.05892."""

    head_size: PositiveInt = 64
    """Channels of a head."""
    attention_size: PositiveInt | None = None
    """Channels of the time mixing; null means hidden_size."""
    ffn_size: PositiveInt | None = None
    """Width inside the channel mixing; null means 3.5 * hidden_size, rounded down to a multiple of
    32 and at least 32."""
    mix_rank: PositiveInt | None = None
    """Rank of the five mixes with the token before; null means 32, of a width from 4096 on 64."""
    decay_rank: PositiveInt | None = None
    """Rank of the decays; null means 64, of a width from 4096 on 128."""
    norm_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the norm over each head; null means 1e-5 * 64."""

    def inner(self, width: int) -> int:
        """Channels of the time mixing in a model of this width."""
        return self.attention_size or width

    def ffn(self, width: int) -> int:
        """Width inside the channel mixing."""
        # As GPT-NeoX, megatron/model/rwkv/v6/rwkv.py.
        return self.ffn_size or max(32, int(3.5 * width) // 32 * 32)

    def ranks(self, width: int) -> "Ranks6":
        """Ranks of the matrices that make mixes and decays."""
        mix = 64 if width >= WIDE else 32
        return Ranks6(self.mix_rank or mix, self.decay_rank or 2 * mix)

    def complete(self, width: int) -> "Rwkv6Options":
        """All sizes in numbers, in a model of this width."""
        ranks = self.ranks(width)
        return Rwkv6Options(
            head_size=self.head_size,
            attention_size=self.inner(width),
            ffn_size=self.ffn(width),
            mix_rank=ranks.mix,
            decay_rank=ranks.decay,
            norm_epsilon=self.head_epsilon,
        )

    @property
    def head_epsilon(self) -> float:
        """Epsilon of the norm over each head."""
        return self.norm_epsilon or 64e-5


CHUNK = 32
"""Tokens of a chunk of RWKV's recurrences; a matter of speed alone."""
MIXES = 5
"""Inputs of RWKV 6 with a mix of their own: of decay, key, value, receptance and gate."""
WIDE = 4096
"""Width from which the published models of RWKV 6 have ranks of twice the size."""


class Ranks6(NamedTuple):
    """Ranks of RWKV 6."""

    mix: int
    decay: int


class Rwkv7Options(Config):
    """RWKV 7, Goose; Peng et al. 2025, arXiv:2503.14456."""

    head_size: PositiveInt = 64
    """Channels of a head."""
    ffn_size: PositiveInt | None = None
    """Width inside the channel mixing; null means 4 * hidden_size."""
    decay_rank: PositiveInt | None = None
    """Rank of the decays; null follows from the width as in the published models."""
    rate_rank: PositiveInt | None = None
    """Rank of the learning rates in context; null follows from the width."""
    value_rank: PositiveInt | None = None
    """Rank of the mix with the first layer's values; null follows from the width."""
    gate_rank: PositiveInt | None = None
    """Rank of the gate; null follows from the width."""

    def ffn(self, width: int) -> int:
        """Width inside the channel mixing in a model of this width."""
        return self.ffn_size or 4 * width

    def complete(self, width: int) -> "Rwkv7Options":
        """All sizes in numbers, in a model of this width."""
        ranks = self.ranks(width)
        return Rwkv7Options(
            head_size=self.head_size,
            ffn_size=self.ffn(width),
            decay_rank=ranks.decay,
            rate_rank=ranks.rate,
            value_rank=ranks.value,
            gate_rank=ranks.gate,
        )

    def ranks(self, width: int) -> "Ranks7":
        """Ranks of the matrices that make decays, rates, mixes of values and gates."""
        # BlinkDL's rules of the published models, RWKV-LM, RWKV-v5/src/model.py.
        root = width**0.5
        return Ranks7(
            decay=self.decay_rank or rounded(1.8 * root),
            rate=self.rate_rank or rounded(1.8 * root),
            value=self.value_rank or rounded(1.3 * root),
            gate=self.gate_rank or rounded(0.6 * width**0.8),
        )


class Ranks7(NamedTuple):
    """Ranks of RWKV 7."""

    decay: int
    rate: int
    value: int
    gate: int


def rounded(size: float) -> int:
    """A multiple of 32, at least 32."""
    return max(32, round(size / 32) * 32)
