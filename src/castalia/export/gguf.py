"""GGUF: a model file for llama.cpp, written straight from the weights without any of its packages.

Source  the format's specification, ggml/docs/gguf.md, version 3; blocks of Q8_0 and Q4_0 in
        ggml-common.h and ggml-quants.c.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from castalia.export.gguf_model import (
    POSITIONS,
    gguf_tensors,
    layer_of,
    shape_values,
    with_heads_apart,
)
from castalia.export.gguf_recurrent import recurrent_tensors, recurrent_values
from castalia.export.gguf_values import STRING, UINT32, Metadata, write_string, write_value
from castalia.export.gguf_vocabulary import vocabulary_values
from castalia.formats.gguf_recurrent import FLOATS, RECURRENT
from castalia.models import Decoder
from castalia.models.config import require_transformer
from castalia.models.model_config import BlocksConfig, ModelConfig
from castalia.tokenizers.special_ids import SpecialIds
from castalia.tokenizers.tokenizer import Tokenizer

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
BLOCK = 32
"""Weights that share a scale in Q8_0 and Q4_0."""
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
"""ggml_type of the matrices; biases and norms are F32."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
QUANTIZATIONS = tuple(KINDS)
ROUTER = "ffn_gate_inp"
"""Of routers, which llama.cpp's own converter stores in F32: a rounded score is another expert."""
BLOCKED = ("Q8_0", "Q4_0")
"""Quantizations in blocks of weights, which must divide the rows of every matrix."""


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    special: SpecialIds,
    *,
    quantization: str,
    chat_template: str | None = None,
) -> None:
    """Write a model file of a model that `Gguf.refuses` has accepted."""
    shape, theirs = shape_and_tensors(config, tensors)
    named = list(theirs.items())
    values = {
        **shape,
        "general.file_type": (UINT32, FILE_TYPES[quantization]),
        "general.alignment": (UINT32, ALIGNMENT),
        **vocabulary_values(tokenizer, config.padded_vocab_size, special),
    }
    if chat_template is not None:
        values["tokenizer.chat_template"] = (STRING, chat_template)
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(named), len(values)))
        for key, (kind, value) in values.items():
            write_string(file, key)
            file.write(struct.pack("<I", kind))
            write_value(file, kind, value)
        write_listing(file, named, quantization)
        for name, tensor in named:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(encoded(tensor, kind_of(name, tensor, quantization)))


def shape_and_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor]
) -> tuple[Metadata, dict[str, Tensor]]:
    """The keys of a model's architecture, and its tensors as that reads them."""
    if config.family in RECURRENT:
        assert isinstance(config, BlocksConfig), "a family with a state"
        theirs = recurrent_tensors(tensors, config)
        # llama.cpp maps the file: the tensors of a layer stand together, layer after layer.
        return recurrent_values(config), {n: theirs[n] for n in sorted(theirs, key=layer_of)}
    model, tensors = with_heads_apart(require_transformer(config, "llama.cpp"), tensors)
    return shape_values(model), gguf_tensors(tensors, model)


def unequal_blocks(config: BlocksConfig, quantization: str) -> str | None:
    """Why a model with a state cannot be stored in blocks, in one sentence; None if it can."""
    # On the meta device the model has shapes and no memory.
    with torch.device("meta"):
        theirs = recurrent_tensors(Decoder(config).state_dict(), config)
    for name, tensor in theirs.items():
        if kind_of(name, tensor, quantization) in BLOCKED and tensor.shape[-1] % BLOCK:
            return (
                f"{quantization} needs rows in multiples of {BLOCK}; those of {name} have"
                f" {tensor.shape[-1]}; choose F16"
            )
    return None


def kind_of(name: str, tensor: Tensor, quantization: str) -> str:
    """How a tensor is stored: vectors, positions, routers, and what only float32 is read of always
    in F32."""
    exact = name == POSITIONS or ROUTER in name or FLOATS.search(name)
    if tensor.dim() > 1 and not exact:
        return quantization
    return "F32"


def size_of(tensor: Tensor, kind: str) -> int:
    """Bytes of a tensor in the file."""
    per_block = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
    return tensor.numel() * per_block[kind] // BLOCK


def write_listing(file: IO[bytes], named: Sequence[tuple[str, Tensor]], quantization: str) -> None:
    """Name, shape, type and offset of every tensor; offsets count from the end of the listing."""
    offset = 0
    for name, tensor in named:
        write_string(file, name)
        # ggml counts dimensions from the fastest, torch from the slowest.
        shape = struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        file.write(struct.pack("<I", tensor.dim()) + shape)
        kind = kind_of(name, tensor, quantization)
        file.write(struct.pack("<IQ", KINDS[kind], offset))
        size = size_of(tensor, kind)
        offset += size + -size % ALIGNMENT


def encoded(tensor: Tensor, kind: str) -> bytes:
    """The bytes of one tensor."""
    values = tensor.detach().to("cpu").float().contiguous()
    if kind == "F32":
        return values.numpy().tobytes()
    if kind == "F16":
        return values.half().numpy().tobytes()
    blocks = values.reshape(-1, BLOCK)
    if kind == "Q8_0":
        return q8_0(blocks).tobytes()
    return q4_0(blocks).tobytes()


def q8_0(blocks: Tensor) -> np.ndarray[Any, Any]:
    """(n, 32) float32 -> (n, 34) uint8: scale = largest / 127 in float16, then 32 int8."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    q = (blocks * torch.where(scale > 0, 1 / scale, 0.0)).round().to(torch.int8)
    return np.concatenate([scale.half().numpy().view(np.uint8), q.numpy().view(np.uint8)], axis=1)


def q4_0(blocks: Tensor) -> np.ndarray[Any, Any]:
    """(n, 32) float32 -> (n, 18) uint8: scale = largest / -8 in float16, then 32 halves of bytes.

    Inputs 0 to 15 are the low halves.
    """
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    q = (
        (blocks * torch.where(scale != 0, 1 / scale, 0.0) + 8.5)
        .floor()
        .clamp(0, 15)
        .to(torch.uint8)
    )
    halves = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([scale.half().numpy().view(np.uint8), halves.numpy()], axis=1)
