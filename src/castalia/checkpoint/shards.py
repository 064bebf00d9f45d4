"""One safetensors file: written by hand so that its hash is of the intended bytes, read by the safetensors library.

Source  the format: https://github.com/huggingface/safetensors#format (length, JSON header, raw data).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castalia.checkpoint.manifest import DTYPES, Chunk, DamagedCheckpointError, FileEntry
from castalia.distributed.boxes import Box

BLOCK = 1 << 24
"""Bytes hashed and written at a time."""
NAMES = {kind: name for name, (kind, _) in DTYPES.items()}
"""torch's type -> its name in the manifest."""


class HashedFile:
    """A file that is hashed while it is written, and on the disk when closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Hash and append, in pieces that stay in the processor's cache between the two."""
        for start in range(0, len(data), BLOCK):
            piece = data[start : start + BLOCK]
            self.digest.update(piece)
            self.file.write(piece)
        self.size += len(data)

    def close(self) -> FileEntry:
        """Force the bytes to the disk; what the file must be from now on."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return FileEntry(size=self.size, sha256=self.digest.hexdigest())


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a whole small file to the disk, hashed."""
    with open(path, "wb") as file:
        out = HashedFile(file)
        out.write(data)
        return out.close()


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write contiguous CPU tensors as one safetensors file, widest elements first so that each is aligned."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        code = DTYPES[NAMES[tensor.dtype]][1]
        header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        out = HashedFile(file)
        out.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            out.write(raw_bytes(tensors[key]))
        return out.close()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Piece:
    """A part of a stored chunk, and where it goes."""

    chunk: Chunk
    dtype: str
    box: Box
    """The part, in the whole tensor."""
    target: Tensor
    """Memory of the box's shape."""


def check_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Compare the file's own header with the manifest.

    Raises  DamagedCheckpointError naming the file and the tensor.
    """
    with opened(path) as file:
        for piece in pieces:
            stored = file.get_slice(piece.chunk.key)
            if (
                stored.get_dtype() != DTYPES[piece.dtype][1]
                or tuple(stored.get_shape()) != piece.chunk.shape
            ):
                raise DamagedCheckpointError(
                    f"{path} is corrupt: {piece.chunk.key} is not what the manifest says"
                )


def read_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Copy pieces of one file to their targets; only the bytes of the boxes are read."""
    with opened(path) as file:
        for piece in pieces:
            if piece.box == piece.chunk.box:
                piece.target.copy_(file.get_tensor(piece.chunk.key))
            else:
                piece.target.copy_(
                    file.get_slice(piece.chunk.key)[piece.box.slices_from(piece.chunk.offset)]
                )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file opened by the library, whose complaints become ours."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is corrupt: {error}") from None
