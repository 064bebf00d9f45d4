"""All weights of a decoder as the native engine keeps them, and the file they are saved in.

The file is safetensors with the packed tensors of packing.py under the names of `Decoder.state_dict()`; it is mapped
into memory, not read: several processes share its pages, and float32 weights exist nowhere. The header is filled up
to a multiple of 64 bytes so that every tensor begins at a cache line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from castalia.core.errors import CheckpointError
from castalia.core.files import write_json
from castalia.inference.native.packing import (
    FLOATS,
    Packed,
    pack,
    quantize_channels,
    require_storage,
)
from castalia.models import build_model_config
from castalia.models.config import ModelConfig, TransformerConfig, require_transformer

FORMAT = "castalia-native"
VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "castalia.json", "native.safetensors"
LINEARS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
LINE = 64
"""Bytes of a cache line."""


@dataclass(frozen=True)
class Weights:
    """A decoder's weights.

    `linears` holds layers.0.attn.qkv … and head, `norms` the LayerNorms under their own names in float32, `embed` the
    rows of the input embedding: float32 or bfloat16, or int8 with a scale a row (int8 and int4).
    """

    config: TransformerConfig
    storage: str
    linears: Mapping[str, Packed]
    norms: Mapping[str, Tensor]
    embed: Tensor
    embed_scale: Tensor | None
    step: int | None = None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in named_tensors(self).values())


def packed_weights(
    tensors: Mapping[str, Tensor], config: ModelConfig, storage: str, step: int | None = None
) -> Weights:
    """Pack the tensors of a checkpoint, one after the other.

    Raises  ConfigError on an unknown storage, or a width that it cannot pack.
    """
    require_storage(storage)
    config = require_transformer(config, "the native engine")
    head = "embed.weight" if config.tie_word_embeddings else "unembed.weight"
    linears = {"head": pack(tensors[head], None, storage)}
    for i in range(config.num_layers):
        for name in LINEARS:
            place = f"layers.{i}.{name}"
            linears[place] = pack(tensors[f"{place}.weight"], tensors.get(f"{place}.bias"), storage)
    norms = {name: tensors[name].float().contiguous() for name in norm_names(config)}
    embed, scale = packed_embedding(tensors["embed.weight"], storage)
    return Weights(config, storage, linears, norms, embed, scale, step)


def norm_names(config: TransformerConfig) -> list[str]:
    """Names of all LayerNorm parameters."""
    places = [f"layers.{i}.norm{k}" for i in range(config.num_layers) for k in (1, 2)]
    return [f"{place}.{kind}" for place in [*places, "norm"] for kind in ("weight", "bias")]


def packed_embedding(weight: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """The rows that are looked up; of int4 they stay in int8, for a step reads one of them alone."""
    if storage in FLOATS:
        return weight.to(FLOATS[storage]).contiguous(), None
    return quantize_channels(weight.float())


def named_tensors(weights: Weights) -> dict[str, Tensor]:
    """Every tensor under its name in the file."""
    found: dict[str, Tensor | None] = {
        "embed.weight": weights.embed,
        "embed.scale": weights.embed_scale,
    }
    found |= weights.norms
    for name, packed in weights.linears.items():
        parts = {"weight": packed.weight, "scale": packed.scale, "bias": packed.bias}
        found |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def save_weights(folder: Path, weights: Weights) -> None:
    """Write castalia.json and native.safetensors into `folder`, which exists."""
    tensors = named_tensors(weights)
    sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            "quantization": weights.storage,
            "step": weights.step,
            "model": weights.config.model_dump(mode="json"),
            "tensors": sizes,
        },
    )
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"fill": ""})
    with open(folder / WEIGHTS_FILE, "rb") as file:
        header = int.from_bytes(file.read(8), "little") + 8
    # The library fills the header up to 8 bytes itself; a longer word in it moves the tensors to the next cache line.
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"fill": " " * (-header % LINE)})


def is_native(folder: Path) -> bool:
    """Whether `folder` is an export of the native engine."""
    return (folder / CONFIG_FILE).is_file()


def load_weights(folder: Path) -> Weights:
    """Map the weights of an export into memory.

    Raises  CheckpointError if a file is missing, truncated, of another version, or does not fit the config.
    """
    listed = read_listing(folder / CONFIG_FILE)
    config = require_transformer(
        build_model_config(listed["model"], str(folder / CONFIG_FILE)), "the native engine"
    )
    storage = listed["quantization"]
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {folder / WEIGHTS_FILE}: {error}; export the model again"
        ) from None
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != listed["tensors"]:
        raise CheckpointError(
            f"the tensors in {folder / WEIGHTS_FILE} are not those of {CONFIG_FILE}; export again"
        )
    return assembled(config, storage, tensors, listed["step"])


def read_listing(path: Path) -> dict[str, Any]:
    """castalia.json of an export.

    Raises  CheckpointError if it is not readable or of another version.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        kind, version = listed["format"], listed["version"]
        require_storage(listed["quantization"])
        assert {"model", "tensors", "step"} <= listed.keys()
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} does not describe a native export ({error!r}); export the model again"
        ) from None
    if (kind, version) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path} is {kind} version {version}; this Castalia reads {FORMAT} version {VERSION}"
        )
    return dict(listed)


def assembled(
    config: TransformerConfig, storage: str, tensors: Mapping[str, Tensor], step: int | None
) -> Weights:
    """Weights out of the tensors of a file."""

    def packed(name: str, channels: int) -> Packed:
        weight, scale, bias = (
            tensors.get(f"{name}.{kind}") for kind in ("weight", "scale", "bias")
        )
        assert weight is not None
        inputs = config.ffn_size if name.endswith("mlp.down") else config.hidden_size
        return Packed(storage, weight, scale, bias, channels, inputs)

    width = config.hidden_size
    channels = {
        "attn.qkv": 3 * width,
        "attn.out": width,
        "mlp.up": config.ffn_size,
        "mlp.down": width,
    }
    linears = {"head": packed("head", config.padded_vocab_size)}
    for i in range(config.num_layers):
        linears |= {
            f"layers.{i}.{name}": packed(f"layers.{i}.{name}", count)
            for name, count in channels.items()
        }
    norms = {name: tensors[name] for name in norm_names(config)}
    return Weights(
        config, storage, linears, norms, tensors["embed.weight"], tensors.get("embed.scale"), step
    )


def rope_angles(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 (max_position_embeddings, rotary_dim / 2)."""
    from castalia.models.parts.rotary import rope_tables

    if not config.rotary_dim:
        return torch.empty(0), torch.empty(0)
    cos, sin = rope_tables(config, torch.arange(config.max_position_embeddings)[None])
    half = config.rotary_dim // 2
    return cos[0, 0, :, :half].contiguous(), sin[0, 0, :, half:].contiguous()
