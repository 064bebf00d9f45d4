"""Weights of linear layers as the kernels read them: quantized, in panels of 16 channels.

A panel holds the numbers of 16 output channels side by side, so that one vector register has one
number of each and nothing is summed across a register. A cell is the part of one channel that fits
a 32-bit lane. Shapes for N output channels and K inputs:

    fp32   (N / 16, K, 16, 1) float32
    bf16   (N / 16, K / 2, 16, 2) bfloat16
    fp16   the same in float16; for torch's kernels alone
    int8   (N / 16, K / 4, 16, 4) int8, one float32 scale a channel: w = q * scale, |q| <= 127
    int4   (N / 16, K / 8, 16, 4) uint8, and one bfloat16 scale for 32 inputs of a channel,
           (N / 16, K / 32, 16). Byte j of a cell has input j in its low half and input j + 4 in
           its high half: w = (half - 8) * scale
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from castalia.core.errors import ConfigError, nearest
from castalia.models.quantizing import GROUP, quantize_channels, quantize_groups

PANEL = 16
"""Output channels in a panel: the float32 lanes of a 512-bit register."""
CELLS = {"fp32": 1, "bf16": 2, "fp16": 2, "int8": 4, "int4": GROUP}
"""K must be a multiple of this."""
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGES = tuple(CELLS)
ROWS_AT_ONCE = 4096
"""Rows quantized at a time: a float32 copy of a whole embedding would double the peak memory."""
PANELS_AT_ONCE = 128
"""Panels unpacked at a time, for the same reason."""


@dataclass(frozen=True)
class Packed:
    """One linear layer, y = x W^T + bias, its channels padded to whole panels with zeros."""

    storage: str
    """One of STORAGES."""
    weight: Tensor
    scale: Tensor | None
    """int8: (N,) float32; int4: (N / 16, K / 32, 16) bfloat16."""
    bias: Tensor | None
    """(N,) float32."""
    channels: int
    """Output channels without the padding."""
    inputs: int


def require_storage(name: str) -> None:
    """Raises  ConfigError listing the known ones."""
    if name not in STORAGES:
        raise ConfigError(
            f"unknown quantization {name!r}; choose one of {', '.join(STORAGES)}"
            f"{nearest(name, STORAGES)}"
        )


def pack(weight: Tensor, bias: Tensor | None, storage: str) -> Packed:
    """Quantize and lay out W (N, K) of any floating dtype.

    Raises  ConfigError if K is not divisible by the inputs that the storage packs together.
    """
    channels, inputs = weight.shape
    if inputs % CELLS[storage]:
        raise ConfigError(
            f"{storage} packs {CELLS[storage]} inputs together, and a layer has {inputs};"
            " choose another quantization"
        )
    weight = padded_rows(weight)
    parts = [quantize(rows.float(), storage) for rows in weight.split(ROWS_AT_ONCE)]
    scales = [scale for _, scale in parts if scale is not None]
    return Packed(
        storage,
        torch.cat([cells for cells, _ in parts]),
        torch.cat(scales) if scales else None,
        None if bias is None else padded_rows(bias.float()).contiguous(),
        channels,
        inputs,
    )


def padded_rows(rows: Tensor) -> Tensor:
    """Rows of zeros after the last, up to a multiple of PANEL."""
    missing = -len(rows) % PANEL
    if missing == 0:
        return rows
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))


def quantize(weight: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Panels and scales of W (N, K) float32, N a multiple of PANEL."""
    if storage in FLOATS:
        return in_panels(weight.to(FLOATS[storage]), CELLS[storage]), None
    if storage == "int8":
        q, scale = quantize_channels(weight)
        return in_panels(q, 4), scale
    q, scale = quantize_groups(weight)
    # Inputs j and j + 4 share a byte: one mask and one shift then unpack 64 bytes at a time.
    halves = in_panels(q + 8, 8).to(torch.uint8)
    return halves[..., :4] | halves[..., 4:] << 4, in_panels(scale, 1)[..., 0].contiguous()


def in_panels(rows: Tensor, cell: int) -> Tensor:
    """(N, K) -> (N / 16, K / cell, 16, cell)."""
    return rows.unflatten(0, (-1, PANEL)).unflatten(2, (-1, cell)).transpose(1, 2).contiguous()


def in_rows(panels: Tensor) -> Tensor:
    """The inverse of `in_panels`."""
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)


def quantized_rows(packed: Packed) -> tuple[Tensor, Tensor]:
    """Integers (N, K) int8 of an int8 or int4 layer, and scales, (N,) or (N, K / 32) float32."""
    assert packed.scale is not None
    if packed.storage == "int8":
        return in_rows(packed.weight), packed.scale
    halves = torch.cat((packed.weight & 15, packed.weight >> 4), -1)
    return in_rows(halves).to(torch.int8) - 8, in_rows(packed.scale[..., None]).float()


def dense(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The unpacked weight of a layer, (channels, K) in `dtype`; built in parts to save memory."""
    out = torch.empty(len(packed.weight) * PANEL, packed.inputs, dtype=dtype)
    for start in range(0, len(packed.weight), PANELS_AT_ONCE):
        part = slice(start, start + PANELS_AT_ONCE)
        rows = slice(start * PANEL, (start + PANELS_AT_ONCE) * PANEL)
        scale = packed.scale
        if scale is not None:
            # int4 has scales by panel, int8 by channel.
            scale = scale[part if packed.storage == "int4" else rows]
        out[rows] = dense_rows(replace(packed, weight=packed.weight[part], scale=scale))
    return out[: packed.channels]


def dense_rows(packed: Packed) -> Tensor:
    """All rows of a layer at once, padding included."""
    if packed.storage in FLOATS:
        return in_rows(packed.weight)
    q, scale = quantized_rows(packed)
    if packed.storage == "int8":
        return q * scale[:, None]
    return (q.unflatten(1, (-1, GROUP)) * scale[..., None]).flatten(1)


def joined(parts: Sequence[Packed], alternate: bool = False) -> Packed:
    """Layers with the same input as one, each padded to whole panels.

    alternate  panels of the parts, of equal size, take turns; else the parts follow each other.
    """
    if len(parts) == 1:
        return parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        bias = merged([bias_of(part) for part in parts], alternate, PANEL)
    scales = [part.scale for part in parts if part.scale is not None]
    # int4 has scales by panel, int8 by channel.
    unit = 1 if parts[0].storage == "int4" else PANEL
    return replace(
        parts[0],
        weight=merged([part.weight for part in parts], alternate),
        scale=merged(scales, alternate, unit) if scales else None,
        bias=bias,
        channels=sum(len(part.weight) * PANEL for part in parts),
    )


def bias_of(packed: Packed) -> Tensor:
    """The bias with its padding; zeros for a layer without one."""
    if packed.bias is not None:
        return packed.bias
    return torch.zeros(len(packed.weight) * PANEL)


def merged(tensors: Sequence[Tensor], alternate: bool, unit: int = 1) -> Tensor:
    """Tensors one after the other, or in turns of `unit` rows."""
    if not alternate:
        return torch.cat(list(tensors))
    return torch.stack([tensor.unflatten(0, (-1, unit)) for tensor in tensors], 1).flatten(0, 2)


def part_of(packed: Packed, panels: slice, channels: int) -> Packed:
    """One of the layers that were joined: its panels, and its channels without the padding."""
    if panels == slice(0, len(packed.weight), 1):
        return replace(packed, channels=channels)

    def taken(tensor: Tensor | None, unit: int = 1) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.unflatten(0, (-1, unit))[panels].flatten(0, 1).contiguous()

    weight = taken(packed.weight)
    assert weight is not None
    scale = taken(packed.scale, 1 if packed.storage == "int4" else PANEL)
    return replace(
        packed, weight=weight, scale=scale, bias=taken(packed.bias, PANEL), channels=channels
    )


def bare(packed: Packed) -> Packed:
    """The same layer without its bias."""
    return replace(packed, bias=None)
