"""The weights of a decoder as the native engine stores them, in memory and in a file.

The file is safetensors with the packed tensors of packing.py under the names of
`Decoder.state_dict()`. It is mapped into memory, not read: several processes share its pages, and
float32 weights never exist. The header is padded to a multiple of 64 bytes so that every tensor
begins at a cache line.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castalia.checkpoint.tensors import save_tensors
from castalia.core.errors import CheckpointError, ConfigError
from castalia.core.files import write_json
from castalia.models.config import TransformerConfig, require_transformer
from castalia.models.families import build_model_config, family_of
from castalia.models.model_config import ModelConfig
from castalia.models.parts.rotary import rope_tables
from castalia.models.quantizing import quantize_channels
from castalia.native.packing import (
    FLOATS,
    PANEL,
    Packed,
    joined,
    pack,
    part_of,
    require_storage,
)

FORMAT = "castalia-native"
VERSION = 1
CONFIG_FILE = "castalia.json"
WEIGHTS_FILE = "native.safetensors"
HEAD = "head"
"""Name of the output layer: unembed.weight, or embed.weight when they are tied."""
LINE = 64
"""Bytes of a cache line."""


PRODUCTS = {
    "attn.qkv": ("qkv", "q", "k", "v"),
    "attn.out": ("attention_out",),
    "mlp.up": ("mlp_gate", "mlp_up"),
    "mlp.down": ("mlp_down",),
}
"""Products of a block, with the roles of the layers in each. Layers that read the same input are
one product: a step starts fewer loops, and its threads wait for each other less often."""
ALTERNATE = "mlp.up"
"""The product whose layers take turns panel by panel, because the gate is multiplied with the rest
as soon as both are computed."""


class Product(NamedTuple):
    """Linear layers that are packed as one."""

    layers: tuple[str, ...]
    """Names in the model."""
    outputs: tuple[int, ...]
    """Output channels of each."""
    inputs: int
    alternate: bool
    """Whether the panels of the layers take turns."""

    @property
    def panels(self) -> tuple[int, ...]:
        """Panels of each layer."""
        return tuple(-(-channels // PANEL) for channels in self.outputs)

    @property
    def channels(self) -> int:
        """Output channels; of several layers with the padding of each."""
        return self.outputs[0] if len(self.outputs) == 1 else sum(self.panels) * PANEL

    def split(self, packed: Packed) -> Iterator[tuple[str, Packed]]:
        """The layers by name."""
        start = 0
        total = sum(self.panels)
        for place, name in enumerate(self.layers):
            panels = slice(start, start + self.panels[place], 1)
            if self.alternate:
                panels = slice(place, total, len(self.layers))
            yield name, part_of(packed, panels, self.outputs[place])
            start = panels.stop


class Layout(NamedTuple):
    """The parameters of a model besides its embedding and its head, as its family declares them."""

    products: dict[str, Product]
    """By the name of the product, layers.0.attn.qkv and so on."""
    norms: list[str]
    """Names of the parameters of norms and positions; they stay in float32."""


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a model of `config`.

    Raises  ConfigError if its family declares no parts, which other engines than torch build on.
    """
    parts = family_of(config).parts(config)
    if parts is None:
        raise ConfigError(
            f"the native engine does not know the blocks of model.family={config.family}"
        )
    products = {}
    norms = []
    for i in range(config.num_layers):
        block = f"layers.{i}."
        for name, roles in PRODUCTS.items():
            layers = [linear for role in roles for linear in parts.linears if linear.role == role]
            products[block + name] = Product(
                tuple(block + linear.place for linear in layers),
                tuple(linear.outputs for linear in layers),
                layers[0].inputs,
                name == ALTERNATE and len(layers) > 1,
            )
        norms += [f"{block}{norm.place}.{kind}" for norm in parts.norms for kind in norm.kinds]
    final = parts.final_norm
    norms += [f"{final.place}.{kind}" for kind in final.kinds]
    return Layout(products, norms + position_names(config))


def position_names(config: ModelConfig) -> list[str]:
    """Names of the tables of positions that were learned."""
    tables = {"learned": ["positions.weight"], "rpe": ["position_bias.weight"]}
    return tables.get(getattr(config, "pos_emb", ""), [])


@dataclass(frozen=True)
class PackedWeights:
    """A decoder's weights.

    `products` holds layers.0.attn.qkv and so on, and the head; `norms` the parameters of norms and
    positions under their own names in float32; `embed` the rows of the input embedding in the dtype
    of a float storage, or in int8 with a scale for each row (int8 and int4).
    """

    config: TransformerConfig
    storage: str
    products: Mapping[str, Packed]
    norms: Mapping[str, Tensor]
    embed: Tensor
    embed_scale: Tensor | None
    step: int | None = None

    def linears(self) -> Iterator[tuple[str, Packed]]:
        """Every linear layer of the model under its own name, and the head."""
        yield HEAD, self.products[HEAD]
        for name, product in layout_of(self.config).products.items():
            yield from product.split(self.products[name])

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in named_tensors(self).values())


def packed_weights(
    tensors: Mapping[str, Tensor], config: ModelConfig, storage: str, step: int | None = None
) -> PackedWeights:
    """Pack the tensors of a checkpoint, one after the other.

    Raises  ConfigError for an unknown storage, or a width that it cannot pack.
    """
    require_storage(storage)
    config = require_transformer(config, "the native engine")
    layout = layout_of(config)
    head = "embed.weight" if config.tie_word_embeddings else "unembed.weight"
    products = {HEAD: pack(tensors[head], None, storage)}
    for name, product in layout.products.items():
        parts = []
        for layer in product.layers:
            parts.append(pack(tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"), storage))
        products[name] = joined(parts, product.alternate)
    norms = {name: tensors[name].float().contiguous() for name in layout.norms}
    embed, scale = packed_embedding(tensors["embed.weight"], storage)
    return PackedWeights(config, storage, products, norms, embed, scale, step)


def packed_embedding(weight: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """The rows that are looked up. int4 keeps them in int8: a step reads one row, so their size
    costs no time."""
    if storage in FLOATS:
        return weight.to(FLOATS[storage]).contiguous(), None
    return quantize_channels(weight.float())


def named_tensors(weights: PackedWeights) -> dict[str, Tensor]:
    """Every tensor under its name in the file."""
    named: dict[str, Tensor | None] = {
        "embed.weight": weights.embed,
        "embed.scale": weights.embed_scale,
        **weights.norms,
    }
    for name, packed in weights.products.items():
        named[f"{name}.weight"] = packed.weight
        named[f"{name}.scale"] = packed.scale
        named[f"{name}.bias"] = packed.bias
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def save_weights(folder: Path, weights: PackedWeights) -> None:
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
    # Written twice: only the library knows how long its header gets.
    save_tensors(tensors, folder / WEIGHTS_FILE, {"fill": ""})
    with open(folder / WEIGHTS_FILE, "rb") as file:
        header = int.from_bytes(file.read(8), "little") + 8
    # The library pads the header to 8 bytes only. A longer word in it moves the tensors to the
    # next cache line.
    save_tensors(tensors, folder / WEIGHTS_FILE, {"fill": " " * (-header % LINE)})


def load_weights(folder: Path) -> PackedWeights:
    """Map the weights of an export into memory.

    Raises  CheckpointError if a file is missing, truncated, of another version, or does not fit
            the config.
    """
    listed = read_listing(folder / CONFIG_FILE)
    config = build_model_config(listed["model"], str(folder / CONFIG_FILE))
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {folder / WEIGHTS_FILE}: {error}; export the model again"
        ) from None
    # A file that was cut exactly between tensors is readable, so names and shapes are compared.
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != listed["tensors"]:
        raise CheckpointError(
            f"the tensors in {folder / WEIGHTS_FILE} are not those of {CONFIG_FILE}; export again"
        )
    return assembled(config, listed["quantization"], tensors, listed["step"])


def read_listing(path: Path) -> dict[str, Any]:
    """castalia.json of an export.

    Raises  CheckpointError if it is not readable or of another version.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        kind = listed["format"]
        version = listed["version"]
        require_storage(listed["quantization"])
        # Later code may rely on these keys.
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
    config: ModelConfig, storage: str, tensors: Mapping[str, Tensor], step: int | None
) -> PackedWeights:
    """Weights out of the tensors of a file."""
    config = require_transformer(config, "the native engine")
    layout = layout_of(config)
    shapes = {HEAD: (config.padded_vocab_size, config.hidden_size)}
    for name, product in layout.products.items():
        shapes[name] = (product.channels, product.inputs)
    products = {}
    for name, (channels, inputs) in shapes.items():
        products[name] = Packed(
            storage,
            tensors[f"{name}.weight"],
            tensors.get(f"{name}.scale"),
            tensors.get(f"{name}.bias"),
            channels,
            inputs,
        )
    norms = {name: tensors[name] for name in layout.norms}
    return PackedWeights(
        config,
        storage,
        products,
        norms,
        embed=tensors["embed.weight"],
        embed_scale=tensors.get("embed.scale"),
        step=step,
    )


def rope_angles(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 (max_position_embeddings, rotary_dim / 2)."""
    if not config.rotary_dim:
        return torch.empty(0), torch.empty(0)
    cos, sin = rope_tables(config, torch.arange(config.max_position_embeddings)[None])
    # torch's tables repeat the angles for both halves of a head, with the sign in the sine.
    half = config.rotary_dim // 2
    return cos[0, 0, :, :half].contiguous(), sin[0, 0, :, half:].contiguous()
