"""One safetensors file, read by the safetensors library and written here.

Source  the format: https://github.com/huggingface/safetensors#format (length, JSON header, raw
        data).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castalia.checkpoint.manifest import DTYPES, MANIFEST, Chunk, DamagedCheckpointError, FileEntry
from castalia.core.hashed_file import HashedFile
from castalia.core.sealed import Seal
from castalia.distributed.boxes import Box

NAMES = {kind: name for name, (kind, _) in DTYPES.items()}
"""torch's dtype -> its name in the manifest."""


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file to the disk; returns its size and hash."""
    with HashedFile(path) as file:
        file.write(data)
        return entry_of(file.sync())


def entry_of(seal: Seal) -> FileEntry:
    """The entry of a file in the manifest."""
    assert seal.size is not None
    return FileEntry(size=seal.size, sha256=seal.sha256)


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
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(raw_bytes(tensors[key]))
        return entry_of(file.sync())


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
