"""One safetensors file, read by the safetensors library and written here.

Source  the format: https://github.com/huggingface/safetensors#format (length, JSON header, raw
        data).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from castalia.checkpoint.manifest import (
    DTYPES,
    LARGEST_JSON,
    MANIFEST,
    Chunk,
    DamagedCheckpointError,
    FileEntry,
    open_plain,
)
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

    @property
    def is_whole(self) -> bool:
        """Whether the bytes of the file are those of the target's memory."""
        target = self.target
        return self.box == self.chunk.box and target.is_contiguous() and target.is_cpu


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


def read_pieces(path: Path, pieces: Sequence[ChunkPart]) -> None:
    """Copy parts of one file to their targets, reading only their bytes."""
    whole = [piece for piece in pieces if piece.is_whole]
    if whole:
        read_whole(path, whole)
    rest = [piece for piece in pieces if not piece.is_whole]
    if rest:
        with torch.no_grad(), opened(path) as file:
            for piece in rest:
                stored = file.get_slice(piece.chunk.key)
                piece.target.copy_(stored[piece.box.slices_from(piece.chunk.offset)])


def read_whole(path: Path, pieces: Iterable[ChunkPart]) -> None:
    """Read whole stored pieces straight into their targets: no mapping, and no copy in between."""
    with open_plain(path) as file:
        places = places_of(file, path)
        for piece in pieces:
            target = raw_bytes(piece.target)
            at, end = places.get(piece.chunk.key, (0, 0))
            if end - at != target.nbytes:
                raise DamagedCheckpointError(f"{path} is corrupt: {piece.chunk.key} has no place")
            read_at(file, path, at, target)


def places_of(file: Any, path: Path) -> dict[str, tuple[int, int]]:
    """First byte of each tensor in an open safetensors file, and the one behind it.

    Raises  DamagedCheckpointError if the header cannot be read.
    """
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, LARGEST_JSON)))
        places = {}
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                places[key] = (8 + length + int(begin), 8 + length + int(end))
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is corrupt: {error}") from None


def read_at(file: Any, path: Path, at: int, target: memoryview) -> None:
    """Fill `target` from byte `at` of an open file."""
    try:
        file.seek(at)
        count = file.readinto(target)
    except OSError as error:
        raise DamagedCheckpointError(f"cannot read {path}: {error.strerror}") from None
    if count != target.nbytes:
        raise DamagedCheckpointError(f"{path} is corrupt: it ends at byte {at + count}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; the library's errors become DamagedCheckpointError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpointError(f"{path} is corrupt: {error}") from None
