"""Where the tensors of GPT-NeoX's layers without attention lie: Mamba, RWKV 6, gMLP and aMLP.

Source  gpt-neox megatron/model/{gmlp,mamba/mamba,rwkv/v6/rwkv}.py at ea7aefd8.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from castalia.core.errors import ConfigError
from castalia.distributed.boxes import Box
from castalia.formats.neox.names import FIRST_BLOCK, NORM_KINDS, RWKV_MIX_OUT, Key
from castalia.formats.pieces import Layout, Piece, Placed
from castalia.models.model_config import BlocksConfig

MAMBA = {
    "mixer.conv.weight": "mixer.conv1d.weight",
    "mixer.conv.bias": "mixer.conv1d.bias",
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.dt_proj.bias": "mixer.dt_proj.bias",
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.out.weight": "mixer.out_proj.weight",
    "mixer.out.bias": "mixer.out_proj.bias",
}
MAMBA_PAIR = ("mixer.x", "mixer.z", "mixer.in_proj")
"""Two matrices here, the rows of one there."""
RWKV_TIME = {
    "mix_x": "time_maa_x",
    "mix_w": "time_maa_w",
    "mix_k": "time_maa_k",
    "mix_v": "time_maa_v",
    "mix_r": "time_maa_r",
    "mix_g": "time_maa_g",
    "mix_in": "time_maa_w1",
    "mix_out": RWKV_MIX_OUT.removeprefix("att."),
    "decay": "time_decay",
    "decay_in": "time_decay_w1",
    "decay_out": "time_decay_w2",
    "bonus": "time_faaaa",
    "norm.weight": "ln_x.weight",
    "norm.bias": "ln_x.bias",
}
RWKV_CHANNEL = {"mix_k": "time_maa_k", "mix_r": "time_maa_r"}
RWKV_NORMS = {"norm1": "ln1", "norm2": "ln2"}
GMLP = {
    "gating.spatial.weight": "sgu.proj.weight",
    "gating.spatial.bias": "sgu.proj.bias",
    "gating.attn.qkv.weight": "sgu.attn.proj_qkv.weight",
    "gating.attn.qkv.bias": "sgu.attn.proj_qkv.bias",
    "gating.attn.out.weight": "sgu.attn.proj_ffn.weight",
    "gating.attn.out.bias": "sgu.attn.proj_ffn.bias",
    "gating.down.weight": "output_linear.weight",
}
GMLP_PAIR = ("gating.up", "gating.gate", "input_linear")
NEVER_ADDED = (
    r"sequential\.\d+\.(input|output)_linear\.bias",
    r"sequential\.\d+\.mixer\.x_proj\.bias",
)
"""Biases of gMLP that GPT-NeoX does not add, and one that `require_same` found to be 0."""
MARKS = {
    "mamba": "mixer.in_proj.weight",
    "rwkv6": "att.time_decay",
    "gmlp": "sgu.proj.weight",
}
"""A tensor of each kind, by which it is known."""
X_PROJ_BIAS = "mixer.x_proj.bias"
RWKV_EPSILON = 1e-5
"""Of RWKV's norms there, whatever the options say."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each of our parameters of a layer, by its name inside it."""


def kind_layout(config: BlocksConfig, kind: str, layer: int, ranks: int, shapes: Shapes) -> Layout:
    """The place of every weight of a layer of `kind`.

    Raises  ConfigError for several model-parallel ranks, and for options that GPT-NeoX's layer
            lacks.
    """
    require_whole(kind, ranks)
    makers = {"mamba": mamba, "rwkv6": rwkv6, "gmlp": gmlp, "amlp": gmlp}
    if kind not in makers:
        raise ConfigError(f"GPT-NeoX has no layers of the kind {kind}; it has {', '.join(makers)}")
    out = {}
    for ours, placed in makers[kind](config, layer, shapes):
        out[f"layers.{layer}.{ours}"] = placed
    return out


def require_same(config: BlocksConfig, tables: Sequence[Mapping[Any, Tensor]], where: str) -> None:
    """Raises  ConfigError if GPT-NeoX's layers have an epsilon or a bias that ours lack."""
    names = {key.name for key in tables[0]}
    if MARKS["rwkv6"] in names and config.layernorm_epsilon != RWKV_EPSILON:
        raise ConfigError(
            f"{where}: layernorm_epsilon {config.layernorm_epsilon:g} with RWKV: GPT-NeoX's norms"
            f" in such layers have {RWKV_EPSILON:g} and the others {config.layernorm_epsilon:g};"
            " Castalia's have one epsilon, and the model cannot be read"
        )
    for table in tables:
        for key, tensor in table.items():
            if key.name == X_PROJ_BIAS and tensor.any():
                raise ConfigError(
                    f"{where}: {key} (mamba_use_bias_in_linears): Castalia's Mamba has no bias of"
                    " the selection, and the model cannot be read"
                )


def require_whole(kind: str, ranks: int) -> None:
    """Raises  ConfigError for a kind of layer whose ranks are no parts of one layer."""
    if ranks == 1 or kind == "rwkv6":
        return
    raise ConfigError(
        f"model_parallel_size {ranks} with layers of the kind {kind}: GPT-NeoX computes each rank's"
        " channels with selections or norms of their own, which is another model than one layer;"
        " Castalia reads those of model_parallel_size 1"
    )


def mamba(config: BlocksConfig, layer: int, shapes: Shapes) -> Iterator[tuple[str, Placed]]:
    """A norm, and the mixer."""
    yield from norm(config, "norm", "norm", layer, shapes)
    yield from named(MAMBA, layer, shapes)
    yield from paired(MAMBA_PAIR, layer, shapes)


def gmlp(config: BlocksConfig, layer: int, shapes: Shapes) -> Iterator[tuple[str, Placed]]:
    """Two norms, and the gating."""
    yield from norm(config, "norm", "norm", layer, shapes)
    yield from norm(config, "gating.norm", "sgu.norm", layer, shapes)
    yield from named(GMLP, layer, shapes)
    yield from paired(GMLP_PAIR, layer, shapes)


def rwkv6(config: BlocksConfig, layer: int, shapes: Shapes) -> Iterator[tuple[str, Placed]]:
    """Both mixers. The norm of the embedding is, in the first layer, the one of the time mixing."""
    names = {f"att.{ours}": f"att.{theirs}" for ours, theirs in RWKV_TIME.items()}
    names |= {f"ffn.{ours}": f"ffn.{theirs}" for ours, theirs in RWKV_CHANNEL.items()}
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in RWKV_NORMS.items()}
        names[f"norm0.{kind}"] = f"ln1.{kind}"
    same = [name for name in shapes if name not in names]
    names |= {name: name for name in same if name.startswith(("att.", "ffn."))}
    yield from named(names, layer, shapes)


def norm(
    config: BlocksConfig, ours: str, theirs: str, layer: int, shapes: Shapes
) -> Iterator[tuple[str, Placed]]:
    """The parameters of a norm."""
    kinds = NORM_KINDS[config.norm].items()
    yield from named({f"{ours}.{own}": f"{theirs}.{name}" for own, name in kinds}, layer, shapes)


def named(names: dict[str, str], layer: int, shapes: Shapes) -> Iterator[tuple[str, Placed]]:
    """Tensors of one shape on both sides, those that the model has."""
    for ours, theirs in names.items():
        if ours in shapes:
            yield ours, Placed(Key(layer + FIRST_BLOCK, theirs), shapes[ours])


def paired(pair: tuple[str, str, str], layer: int, shapes: Shapes) -> Iterator[tuple[str, Placed]]:
    """Two matrices or biases of ours as the rows of one."""
    first, second, theirs = pair
    for kind in ("weight", "bias"):
        shape = shapes.get(f"{first}.{kind}")
        if shape is None:
            continue
        key = Key(layer + FIRST_BLOCK, f"{theirs}.{kind}")
        zeros = (0,) * len(shape)
        for place, ours in enumerate((first, second)):
            start = (place * shape[0], *zeros[1:])
            pieces = (Piece(0, Box(zeros, shape), start),)
            yield f"{ours}.{kind}", Placed(key, shape, "split", pieces)


def layer_shapes(config: Any) -> list[Shapes]:
    """The shapes of each layer's parameters, by their names inside it."""
    import torch

    from castalia.models import Decoder

    # On the meta device the model has shapes and no memory.
    with torch.device("meta"):
        tensors = Decoder(config).state_dict()
    out: list[Shapes] = [{} for _ in range(config.num_layers)]
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            out[int(layer)][rest] = tuple(tensor.shape)
    return out
