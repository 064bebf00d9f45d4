"""One safetensors file, read by the safetensors library and written here.

Writing here makes the hash one of the intended bytes: hashing a file after it was written would
also vouch for what the disk made of it.
Source  the format: https://github.com/huggingface/safetensors#format (length, JSON header, raw
        data).
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

from castalia.checkpoint.manifest import DTYPES, MANIFEST, Chunk, DamagedCheckpointError, FileEntry
from castalia.distributed.boxes import Box

BLOCK = 1 << 24
"""Bytes hashed and written at a time; small enough to stay in the cache between the two."""
NAMES = {kind: name for name, (kind, _) in DTYPES.items()}
"""torch's dtype -> its name in the manifest."""


class HashedFile:
    """A file that is hashed while it is written, and synced when closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Hash and append."""
        for start in range(0, len(data), BLOCK):
            piece = data[start : start + BLOCK]
            self.digest.update(piece)
            self.file.write(piece)
        self.size += len(data)

    def close(self) -> FileEntry:
        """Sync the bytes to the disk; returns their size and hash."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return FileEntry(size=self.size, sha256=self.digest.hexdigest())


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file to the disk; returns its size and hash."""
    with open(path, "wb") as file:
        out = HashedFile(file)
        out.write(data)
        return out.close()


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write contiguous CPU tensors as one safetensors file."""
    # Widest elements first, so that every tensor is aligned without padding.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin = end
        end += tensor.nbytes
        code = DTYPES[NAMES[tensor.dtype]][1]
        header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with open(path, "wb") as file:
        out = HashedFile(file)
        out.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            out.write(raw_bytes(tensors[key]))
        return out.close()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class ChunkPart:
    """A part of a stored chunk, and the memory that it is read into."""

    chunk: Chunk
    dtype: str
    box: Box
    """Place of the part in the whole tensor."""
    target: Tensor
    """Tensor of the box's shape."""


def check_pieces(path: Path, pieces: Iterable[ChunkPart]) -> None:
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
                    f"{path} is corrupt: {piece.chunk.key} has another shape or dtype than in"
                    f" {MANIFEST}"
                )


def read_pieces(path: Path, pieces: Iterable[ChunkPart]) -> None:
    """Copy parts of one file to their targets, reading only their bytes."""
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
    """An open safetensors file; the library's errors become DamagedCheckpointError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is corrupt: {error}") from None
