"""A GGUF file as it is stored: its metadata, and its float tensors mapped from the disk.

Source  the format's specification, ggml/docs/gguf.md, versions 2 and 3.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castalia.checkpoint.manifest import DamagedCheckpointError
from castalia.core.errors import CheckpointError, ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""struct's letter of each kind of number, gguf_metadata_value_type."""
STRING = 8
ARRAY = 9
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml_type of the types that are read."""
QUANTIZED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 14: "Q6_K"}
"""Names of common other types, for the message."""
MOST_DIMENSIONS = 4
LARGEST_COUNT = 1 << 32
"""Items of an array above which a file is taken for damaged."""


@dataclass(frozen=True)
class GgufFile:
    """One file."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    """By name, mapped from the file, dimensions in torch's order."""


class Reader:
    """The bytes of a file from the front."""

    def __init__(self, data: np.memmap[Any, Any], path: Path) -> None:
        self.data = data
        self.path = path
        self.place = 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises  DamagedCheckpointError if the file ends before.
        """
        end = self.place + count
        if end > len(self.data):
            raise DamagedCheckpointError(
                f"{self.path} is truncated at byte {len(self.data)}; copy the file again"
            )
        out = self.data[self.place : end].tobytes()
        self.place = end
        return out

    def number(self, letter: str) -> Any:
        """The next number, of struct's kind `letter`."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).decode("utf-8", "surrogatepass")

    def value(self, kind: int) -> Any:
        """The next value of the metadata.

        Raises  DamagedCheckpointError for an unknown kind.
        """
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise DamagedCheckpointError(
                f"{self.path}: unknown kind of value {kind} in its metadata; copy the file again"
            )
        return self.number(SCALARS[kind])

    def array(self) -> list[Any]:
        """The next list."""
        kind = self.number("I")
        count = self.number("Q")
        if count > LARGEST_COUNT:
            raise DamagedCheckpointError(
                f"{self.path}: an array of {count} items in its metadata; copy the file again"
            )
        if kind in SCALARS:
            letter = SCALARS[kind]
            raw = self.take(count * struct.calcsize(f"<{letter}"))
            return list(struct.unpack(f"<{count}{letter}", raw))
        item: Callable[[], Any] = self.text if kind == STRING else self.array
        return [item() for _ in range(count)]


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Raises  DamagedCheckpointError for what Python says of values that no whole file has."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} is damaged ({error!r}); copy it again") from error


def read_gguf_file(path: Path) -> GgufFile:
    """Metadata and tensors of a file.

    Raises  DamagedCheckpointError if it is not whole; CheckpointError if it is no GGUF file of
            version 2 or 3; ConfigError if a tensor is quantized.
    """
    # An empty file cannot be mapped; the check of its first bytes below refuses it.
    data: Any = np.zeros(0, np.uint8)
    if path.stat().st_size:
        # Copy on write: nothing here changes the file, and torch warns about read-only memory.
        data = np.memmap(path, np.uint8, "c")
    reader = Reader(data, path)
    version = 0
    if len(data) >= len(MAGIC) and reader.take(len(MAGIC)) == MAGIC:
        version = reader.number("I")
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is no GGUF file of version 2 or 3; convert the model again")
    tensors = reader.number("Q")
    keys = reader.number("Q")
    metadata = {}
    for _ in range(keys):
        key = reader.text()
        metadata[key] = reader.value(reader.number("I"))
    listing = [listed(reader) for _ in range(tensors)]
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    base = reader.place + -reader.place % alignment
    return GgufFile(
        metadata,
        {
            name: mapped(data, path, name, shape, kind, base + offset)
            for name, shape, kind, offset in listing
        },
    )


def listed(reader: Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in torch's order, ggml_type and offset of the next tensor."""
    name = reader.text()
    count = reader.number("I")
    if count > MOST_DIMENSIONS:
        raise DamagedCheckpointError(
            f"{reader.path}: {name!r} has {count} dimensions; copy the file again"
        )
    # ggml counts dimensions from the fastest, torch from the slowest.
    shape = tuple(reversed([reader.number("Q") for _ in range(count)]))
    kind = reader.number("I")
    return name, shape, kind, reader.number("Q")


def mapped(
    data: Any, path: Path, name: str, shape: tuple[int, ...], kind: int, start: int
) -> Tensor:
    """One tensor, not read yet.

    Raises  ConfigError if it is quantized; DamagedCheckpointError if it lies beyond the file.
    """
    if kind not in FLOATS:
        word = QUANTIZED.get(kind, f"ggml type {kind}")
        raise ConfigError(
            f"{path}: {name} is stored as {word}; Castalia reads GGUF files in F32, F16 and BF16;"
            " take the float file, or run this one with engine=llama.cpp"
        )
    dtype = FLOATS[kind]
    size = math.prod(shape) * dtype.itemsize
    if start + size > len(data):
        raise DamagedCheckpointError(
            f"{path} is truncated: {name} ends at byte {start + size}, the file at {len(data)};"
            " copy the file again"
        )
    # Bytes first: numpy has no bfloat16.
    return torch.from_numpy(data[start : start + size]).view(dtype).view(shape)


class Metadata:
    """The values of one architecture, by their names without it."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.architecture = str(values.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """A value; of one that is listed for each layer, the one they have in common.

        Raises  ConfigError if layers differ in it.
        """
        value = self.values.get(f"{self.architecture}.{name}", default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ConfigError(f"{self.where}: {name} differs between layers, which no family has")
        return value[0]

    def need(self, name: str) -> Any:
        """A value that must be there.

        Raises  ConfigError if it is not.
        """
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.where}: {self.architecture}.{name} is missing")
        return value
