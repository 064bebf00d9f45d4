"""Mamba and RWKV in GGUF files: names and shapes of their tensors, both ways.

Source  llama.cpp, src/models/{mamba,mamba2,rwkv6,rwkv7}.cpp and their bases: the tensors that each
        loads, with their shapes, and what it computes; gguf-py/gguf/constants.py (names).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.keymap import Join, KeyMap, Rule, Transform, gathered, rows_joined
from castalia.checkpoint.tensors import StackedTensor, StoredTensor, StoredTensors
from castalia.core.errors import CheckpointError, ConfigError
from castalia.formats.gguf_file import Metadata
from castalia.models import Decoder
from castalia.models.model_config import BlocksConfig
from castalia.recurrent.options import Mamba2Options, MambaOptions, Rwkv7Options

RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv7")
"""Architectures there and families here, of one kind of layer with a state."""
BLOCK = "blk.{i}"
OURS = "layers.{i}"
MIX_ORDER = {"rwkv6": "wkvrg", "rwkv7": "rwkvag"}
"""Inputs of the time mixing with a mix of their own, in the order of the file."""
MATRICES = ("receptance", "key", "value", "output")
LOW_RANK = {
    "rwkv6": {"decay_in": "decay_w1", "decay_out": "decay_w2", "mix_in": "w1"},
    "rwkv7": {
        f"{name}_{way}": f"{letter}{number}"
        for name, letter in (("decay", "w"), ("rate", "a"), ("gate", "g"))
        for way, number in (("in", 1), ("out", 2))
    },
}
"""Matrices that multiply from the right here and from the left there."""
VALUE_MIX = {"value_in": "v1", "value_out": "v2"}
"""The same of the mix with the first layer's values, which the first layer has not."""
VECTORS = {
    "rwkv6": {"mix_x": "lerp_x", "decay": "decay", "bonus": "first"},
    "rwkv7": {
        "decay": "w0",
        "rate": "a0",
        "key_scale": "k_k",
        "key_rate": "k_a",
        "bonus": "r_k",
    },
}
UNUSED = (r"blk\.0\.time_mix_v[012]\.weight",)
"""Tensors of RWKV 7's first layer that llama.cpp wants and does not use."""
FLOATS = re.compile(
    r"ssm_(conv1d|a|d|norm)\b|time_mix_(lerp|first|decay|[wavg]\d|[rk]_[ka])|channel_mix_lerp"
)
"""Tensors that its graphs read as float32 alone."""


def recurrent_keymap(config: BlocksConfig) -> KeyMap:
    """Our names and llama.cpp's for a model of one of `RECURRENT`."""
    rules = [Rule("embed.weight", "token_embd.weight")]
    if not config.tie_word_embeddings:
        rules.append(Rule("unembed.weight", "output.weight"))
    kinds = ("weight",) if config.norm == "rmsnorm" else ("weight", "bias")
    rules += [Rule(f"norm.{kind}", f"output_norm.{kind}") for kind in kinds]
    makers = {"mamba": mamba, "mamba2": mamba2, "rwkv6": rwkv6, "rwkv7": rwkv7}
    rules += makers[config.family](config)
    return KeyMap("GGUF", rules, layers=config.num_layers, ignored=UNUSED)


def mamba(config: BlocksConfig) -> Iterator[Rule]:
    """A norm, and the mixer, whose two branches are one matrix there."""
    options = config.mamba or MambaOptions()
    inner = options.channels(config.hidden_size)
    yield Rule(f"{OURS}.norm.weight", f"{BLOCK}.attn_norm.weight")
    both = (f"{OURS}.mixer.x.weight", f"{OURS}.mixer.z.weight")
    yield Rule(both, f"{BLOCK}.ssm_in.weight", rows_joined([inner, inner]))
    for kind in ("weight", "bias"):
        yield Rule(f"{OURS}.mixer.conv.{kind}", f"{BLOCK}.ssm_conv1d.{kind}")
        yield Rule(f"{OURS}.mixer.dt_proj.{kind}", f"{BLOCK}.ssm_dt.{kind}")
    yield Rule(f"{OURS}.mixer.x_proj.weight", f"{BLOCK}.ssm_x.weight")
    yield Rule(f"{OURS}.mixer.ssm.A_log", f"{BLOCK}.ssm_a", Transform(decay, log_of_decay))
    yield Rule(f"{OURS}.mixer.ssm.D", f"{BLOCK}.ssm_d")
    yield Rule(f"{OURS}.mixer.out.weight", f"{BLOCK}.ssm_out.weight")


def mamba2(config: BlocksConfig) -> Iterator[Rule]:
    """The same with heads, of which each has one decay; all that comes of the token is one
    matrix."""
    options = config.mamba2 or Mamba2Options()
    inner = options.channels(config.hidden_size)
    both = options.groups * options.state_size
    heads = options.heads(config.hidden_size)
    yield Rule(f"{OURS}.norm.weight", f"{BLOCK}.attn_norm.weight")
    parts = tuple(f"{OURS}.mixer.{name}.weight" for name in ("z", "x", "B", "C", "dt"))
    rows = [inner, inner, both, both, heads]
    yield Rule(parts, f"{BLOCK}.ssm_in.weight", rows_joined(rows))
    for kind in ("weight", "bias"):
        convs = tuple(f"{OURS}.mixer.conv_{name}.{kind}" for name in ("x", "B", "C"))
        yield Rule(convs, f"{BLOCK}.ssm_conv1d.{kind}", rows_joined([inner, both, both]))
    yield Rule(f"{OURS}.mixer.ssm.dt_bias", f"{BLOCK}.ssm_dt.bias")
    column = Transform(lambda row: decay(row)[:, None], lambda rows: log_of_decay(rows.flatten()))
    yield Rule(f"{OURS}.mixer.ssm.A_log", f"{BLOCK}.ssm_a", column)
    yield Rule(f"{OURS}.mixer.ssm.D", f"{BLOCK}.ssm_d", Transform(as_column, torch.flatten))
    groups = Transform(lambda row: row.view(options.groups, -1), torch.flatten)
    yield Rule(f"{OURS}.mixer.norm.weight", f"{BLOCK}.ssm_norm.weight", groups)
    yield Rule(f"{OURS}.mixer.out.weight", f"{BLOCK}.ssm_out.weight")


def rwkv6(config: BlocksConfig) -> Iterator[Rule]:
    """Time mixing and channel mixing; the mixes of the time mixing are one tensor there."""
    yield from rwkv(config, (*MATRICES, "gate"))
    mixes = Transform(
        lambda ours: ours.unflatten(0, (len(MIX_ORDER["rwkv6"]), -1)).transpose(1, 2),
        lambda theirs: theirs.transpose(1, 2).flatten(0, 1),
    )
    yield Rule(f"{OURS}.att.mix_out", f"{BLOCK}.time_mix_w2.weight", mixes)
    yield Rule(f"{OURS}.ffn.mix_r", f"{BLOCK}.channel_mix_lerp_r.weight")
    yield Rule(f"{OURS}.ffn.receptance.weight", f"{BLOCK}.channel_mix_receptance.weight")


def rwkv7(config: BlocksConfig) -> Iterator[Rule]:
    """The same with rates, and with values of the first layer in all others."""
    yield from rwkv(config, MATRICES)
    others = tuple(range(1, config.num_layers))
    if not others:
        return
    yield Rule(f"{OURS}.att.value_mix", f"{BLOCK}.time_mix_v0.weight", layers=others)
    for ours, theirs in VALUE_MIX.items():
        place = f"{BLOCK}.time_mix_{theirs}.weight"
        yield Rule(f"{OURS}.att.{ours}", place, Transform(turned, turned), layers=others)


def rwkv(config: BlocksConfig, matrices: Sequence[str]) -> Iterator[Rule]:
    """What both versions have."""
    family = config.family
    for kind in ("weight", "bias"):
        yield Rule(f"layers.0.norm0.{kind}", f"token_embd_norm.{kind}")
        yield Rule(f"{OURS}.norm1.{kind}", f"{BLOCK}.attn_norm.{kind}")
        yield Rule(f"{OURS}.norm2.{kind}", f"{BLOCK}.attn_norm_2.{kind}")
        yield Rule(f"{OURS}.att.norm.{kind}", f"{BLOCK}.time_mix_ln.{kind}")
    for name in matrices:
        yield Rule(f"{OURS}.att.{name}.weight", f"{BLOCK}.time_mix_{name}.weight")
    for name in ("key", "value"):
        yield Rule(f"{OURS}.ffn.{name}.weight", f"{BLOCK}.channel_mix_{name}.weight")
    for ours, theirs in VECTORS[family].items():
        how = Transform()
        if theirs == "r_k":
            # By heads here, a vector there.
            size = (config.rwkv7 or Rwkv7Options()).head_size
            how = Transform(torch.flatten, partial(by_heads, size=size))
        yield Rule(f"{OURS}.att.{ours}", f"{BLOCK}.time_mix_{theirs}.weight", how)
    for ours, theirs in LOW_RANK[family].items():
        place = f"{BLOCK}.time_mix_{theirs}.weight"
        yield Rule(f"{OURS}.att.{ours}", place, Transform(turned, turned))
    yield Rule(f"{OURS}.ffn.mix_k", f"{BLOCK}.channel_mix_lerp_k.weight")
    letters = MIX_ORDER[family]
    mixes = tuple(f"{OURS}.att.mix_{letter}" for letter in letters)
    join = Join(
        lambda ours: torch.stack(list(ours))[:, None, None],
        lambda theirs: theirs.reshape(len(letters), -1).unbind(),
    )
    yield Rule(mixes, f"{BLOCK}.time_mix_lerp_fused.weight", join)


def decay(log: Tensor) -> Tensor:
    """llama.cpp's decays of our logarithms, in float32."""
    return -torch.exp(log.float())


def log_of_decay(negative: Tensor) -> Tensor:
    """Our logarithms of its decays."""
    return torch.log(-negative.float())


def as_column(vector: Tensor) -> Tensor:
    """(H,) as (H, 1)."""
    return vector[:, None]


def by_heads(vector: Tensor, size: int) -> Tensor:
    """(C,) as (H, N) with N = `size`."""
    return vector.unflatten(0, (-1, size))


def turned(matrix: Tensor) -> Tensor:
    """(outputs, inputs) of (inputs, outputs)."""
    return matrix.t()


@dataclass(frozen=True)
class MappedTensor:
    """One of our tensors out of one of a file, which is mapped into memory."""

    source: Tensor
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor in Castalia's layout."""
        outline = torch.empty(self.source.shape, dtype=self.source.dtype, device="meta")
        return tuple(self.transform.back(outline).shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.source.dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        return self.transform.back(self.source)[part].to(self.dtype).clone()


def recurrent_options(values: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Family and section of our config.

    Raises  ConfigError if a value is missing, or the layers are scaled down.
    """
    family = values.architecture
    width = values.need("embedding_length")
    if family.startswith("mamba"):
        section: dict[str, Any] = {
            "conv_size": values.need("ssm.conv_kernel"),
            "inner_size": values.need("ssm.inner_size"),
            "state_size": values.need("ssm.state_size"),
        }
        rank = values.need("ssm.time_step_rank")
        if family == "mamba":
            section["dt_rank"] = rank
        else:
            section["head_size"] = section["inner_size"] // rank
            section["groups"] = values.get("ssm.group_count", 1)
        if section["inner_size"] == 2 * width:
            del section["inner_size"]
        norm = "rmsnorm"
    else:
        norm = "layernorm"
        if values.get("rescale_every_n_layers"):
            raise ConfigError(
                f"{values.where}: rescale_every_n_layers halves the weights of later layers, which"
                " only engine=llama.cpp undoes; convert the model without it"
            )
        section = {
            "head_size": values.need("wkv.head_size"),
            "ffn_size": values.need("feed_forward_length"),
            **ranks_of(values),
        }
    return {"family": family, "norm": norm, family: section}


def ranks_of(values: Metadata) -> dict[str, int]:
    """The ranks of RWKV's small matrices.

    Raises  ConfigError if one is missing.
    """
    if values.architecture == "rwkv6":
        names = {"mix_rank": "time_mix_extra_dim", "decay_rank": "time_decay_extra_dim"}
    else:
        names = {
            "decay_rank": "attention.decay_lora_rank",
            "rate_rank": "attention.iclr_lora_rank",
            "value_rank": "attention.value_residual_mix_lora_rank",
            "gate_rank": "attention.gate_lora_rank",
        }
    return {ours: values.need(theirs) for ours, theirs in names.items()}


def recurrent_weights(
    config: BlocksConfig, tensors: Mapping[str, Tensor], where: str, optional: Collection[str]
) -> StoredTensors:
    """The weights under our names, read in parts when asked for.

    Raises  CheckpointError naming tensors that no rule knows, missing ones, and shapes that differ.
    """
    rules = recurrent_keymap(config).rules_for(tensors, optional)
    # On the meta device the model has shapes and no memory.
    with torch.device("meta"):
        outlines = Decoder(config).state_dict()
    for key, rule in rules.items():
        wanted = squeezed(rule.joined(outlines).shape)
        if squeezed(tensors[key].shape) != wanted:
            raise CheckpointError(
                f"{where}: {key} is {list(tensors[key].shape)}, expected {wanted}; its metadata"
                " describes another model than the weights"
            )

    def mapped(key: str, transform: Transform) -> StoredTensor:
        rule = rules[key].joined(outlines)
        return MappedTensor(tensors[key].reshape(rule.shape), transform)

    return StoredTensors(gathered(rules, mapped, lambda rows: StackedTensor(tuple(rows))))


def squeezed(shape: Sequence[int]) -> list[int]:
    """A shape without dims of one, which writers of these files add and leave out."""
    return [size for size in shape if size != 1]
