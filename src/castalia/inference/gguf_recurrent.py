"""The models with a state that llama.cpp computes, as data.

Source  llama.cpp, src/models/{mamba,mamba2,rwkv6,rwkv7}.cpp and their bases.
"""

from collections.abc import Iterator

from castalia.formats.gguf_recurrent import RECURRENT
from castalia.inference.implements import START, Values, unimplemented
from castalia.models.model_config import BlocksConfig, ModelConfig
from castalia.recurrent.options import Mamba2Options, MambaOptions, Rwkv6Options, Rwkv7Options

HEAD_EPSILON = 64e-5
"""Of the norm over RWKV's heads, a constant there."""
STEP = 64
"""Channels that its kernel of RWKV 7 computes at a time with AVX-512; of other sizes it reads and
writes beyond the end of a head."""
COMMON: dict[str, Values] = START | {
    "family": RECURRENT,
    "num_layers": None,
    "hidden_size": None,
    "vocab_size": None,
    "make_vocab_size_divisible_by": None,
    "max_position_embeddings": None,
    "layernorm_epsilon": None,
    "tie_word_embeddings": (True, False),
}
TABLES: dict[str, dict[str, Values]] = {
    **{name: COMMON | {"norm": ("rmsnorm",), name: None} for name in ("mamba", "mamba2")},
    **{name: COMMON | {"norm": ("layernorm",), name: None} for name in ("rwkv6", "rwkv7")},
}
"""Options of each family that it computes, see implements.py; `lacking` looks at the sections."""


def recurrent_refusal(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot compute a model of one of RECURRENT, in one sentence; None if it can."""
    assert isinstance(config, BlocksConfig), "a family with a state"
    missing = unimplemented(config, TABLES[config.family])
    if missing is None:
        missing = next(lacking(config), None)
    return None if missing is None else f"engine=llama.cpp does not implement {missing}"


def lacking(config: BlocksConfig) -> Iterator[str]:
    """Options of the family's section that it has no graph for, as NAME=VALUE."""
    width = config.hidden_size
    if config.family == "mamba":
        mamba = config.mamba or MambaOptions()
        if mamba.channels(width) != 2 * width:
            yield f"mamba.inner_size={mamba.inner_size}, only 2 * hidden_size"
        yield from biases("mamba", mamba)
    elif config.family == "mamba2":
        mamba2 = config.mamba2 or Mamba2Options()
        if mamba2.channels(width) % (mamba2.groups * width):
            yield (
                f"mamba2.groups={mamba2.groups} with {mamba2.channels(width)} channels, which must"
                " be a multiple of groups * hidden_size"
            )
        if mamba2.dt_limit is not None:
            yield f"mamba2.dt_limit={mamba2.dt_limit}"
        yield from biases("mamba2", mamba2)
    elif config.family == "rwkv6":
        rwkv6 = config.rwkv6 or Rwkv6Options()
        if rwkv6.inner(width) != width:
            yield f"rwkv6.attention_size={rwkv6.attention_size}, only hidden_size"
        if rwkv6.head_epsilon != HEAD_EPSILON:
            yield f"rwkv6.norm_epsilon={rwkv6.head_epsilon:g}, only {HEAD_EPSILON:g}"
    elif config.family == "rwkv7":
        size = (config.rwkv7 or Rwkv7Options()).head_size
        if size % STEP:
            yield f"rwkv7.head_size={size}, only multiples of {STEP}"


def biases(name: str, options: MambaOptions | Mamba2Options) -> Iterator[str]:
    """Its convolution has a bias, its projections have none."""
    if not options.conv_bias:
        yield f"{name}.conv_bias=False"
    if options.bias:
        yield f"{name}.bias=True"
