"""`model.bin` of CTranslate2, written with numpy and struct, without ctranslate2 or transformers.

The file equals, byte for byte, that of ctranslate2's own serializer for the same weights.

Layout, little-endian, strings as u16 length + 1, bytes, NUL:
    u32 6 | "TransformerDecoderSpec" | u32 8 | u32 variables
    each variable, by name: its name | u8 rank | u32 a dimension | u8 type | u32 bytes | the bytes
    u32 aliases | each: its name | the name of the variable it stands for
Source  CTranslate2 4.8, python/ctranslate2/specs/model_spec.py.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from castalia.core.errors import ConfigError

BINARY_VERSION = 6
SPECIFICATION = "TransformerDecoderSpec"
REVISION = 8
TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
"""The index of a type is its number in the file."""
MOST_BYTES = 2**32 - 1
"""A variable's size is a u32."""
FLOATS = {
    "float32": "float32",
    "int8": None,
    "int8_float32": "float32",
    "int8_float16": "float16",
    "int8_bfloat16": "bfloat16",
    "int16": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}
"""dtype of the tensors that a quantization does not turn into integers; None keeps their own."""
QUANTIZATIONS = tuple(FLOATS)
"""Storage of weights. A CPU computes in float32 or int8 and converts the others on loading."""


class Variable(NamedTuple):
    """One entry of the file: type name, shape and the bytes."""

    kind: str
    shape: tuple[int, ...]
    data: bytes


def write_model_bin(
    path: Path,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, NDArray[np.generic]],
    quantization: str,
) -> None:
    """Write the weights under CTranslate2's names, one tensor in memory at a time.

    `scalars` and tables of numbers are stored as they are.
    Raises  ConfigError if a tensor is larger than the file can say.
    """
    aliases = duplicates(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    names = sorted(
        [*scalars, *kept, *(f"{name}_scale" for name in kept if has_scale(name, quantization))]
    )
    scale: dict[str, Variable] = {}
    with open(path, "wb") as file:
        write_header(file, len(names))
        for name in names:
            if name in scalars:
                write_variable(file, name, as_variable(scalars[name]))
            elif name in scale:
                write_variable(file, name, scale.pop(name))
            else:
                value, its_scale = stored(name, kept[name], quantization)
                write_variable(file, name, value)
                if its_scale is not None:
                    scale[f"{name}_scale"] = its_scale
        file.write(struct.pack("<I", len(aliases)))
        for name in sorted(aliases):
            write_string(file, name)
            write_string(file, aliases[name])


def duplicates(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors equal to another one, with that one's name, the first in the alphabet."""
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    aliases = {}
    for name in sorted(tensors):
        key = tuple(tensors[name].shape), hashlib.sha256(floats(tensors[name]).tobytes()).digest()
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def has_scale(name: str, quantization: str) -> bool:
    """Whether the tensor becomes integers: matrices do, biases and norms do not."""
    return name.endswith("/weight") and quantization.startswith("int")


def stored(name: str, tensor: Tensor, quantization: str) -> tuple[Variable, Variable | None]:
    """A tensor as the file holds it, and its scale."""
    if has_scale(name, quantization):
        convert: Callable[[Any], tuple[Any, Any]] = to_int8
        if quantization == "int16":
            convert = to_int16
        values, scale = convert(floats(tensor))
        return as_variable(values), as_variable(scale)
    kind = FLOATS[quantization] or str(tensor.dtype).removeprefix("torch.")
    rounded = tensor.detach().to("cpu", getattr(torch, kind)).contiguous()
    raw = rounded
    # numpy has no bfloat16; its bits travel as int16.
    if kind == "bfloat16":
        raw = rounded.view(torch.int16)
    return Variable(kind, tuple(tensor.shape), raw.numpy().tobytes()), None


def to_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows of 8-bit integers, scale = 127 / the row's largest magnitude: w ~ integer / scale."""
    largest = np.abs(values).max(axis=1)
    largest[largest == 0] = 127.0
    largest = np.maximum(
        largest, np.float32(127) / np.finfo(np.float32).max
    )  # keeps the scale finite
    scale = (np.float32(127.0) / largest).astype(np.float32)
    return np.rint(values * scale[:, None]).astype(np.int8), scale


def to_int16(values: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """10-bit integers with one scale a matrix: a product then leaves 12 bits for the sum."""
    scale = np.asarray(np.float32(2**10 / np.abs(values).max()))
    return np.clip(np.rint(values * scale), -(2**15), 2**15 - 1).astype(np.int16), scale


def floats(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's numbers in float32."""
    array: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def as_variable(array: NDArray[np.generic]) -> Variable:
    """An array as an entry of the file."""
    return Variable(array.dtype.name, array.shape, array.tobytes())


def write_header(file: BinaryIO, variables: int) -> None:
    """The header, which precedes the variables."""
    file.write(struct.pack("<I", BINARY_VERSION))
    write_string(file, SPECIFICATION)
    file.write(struct.pack("<II", REVISION, variables))


def write_variable(file: BinaryIO, name: str, variable: Variable) -> None:
    """One entry.

    Raises  ConfigError beyond 4 GiB.
    """
    size = len(variable.data)
    if size > MOST_BYTES:
        raise ConfigError(
            f"{name} has {size:,} bytes, but CTranslate2's file holds at most 4 GiB a tensor;"
            " use int8"
        )
    write_string(file, name)
    file.write(struct.pack(f"<B{len(variable.shape)}I", len(variable.shape), *variable.shape))
    file.write(struct.pack("<BI", TYPES.index(variable.kind), size))
    file.write(variable.data)


def write_string(file: BinaryIO, text: str) -> None:
    """A length, the bytes and a NUL."""
    data = text.encode()
    file.write(struct.pack("<H", len(data) + 1) + data + b"\0")
