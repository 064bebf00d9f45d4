"""Stored tensors, read on demand and in parts, so that a rank never holds more than its own."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from castalia.checkpoint.keymap import Transform
from castalia.checkpoint.manifest import DTYPES, DamagedCheckpointError, Manifest, TensorEntry, hold
from castalia.checkpoint.shards import NAMES, ChunkPart, opened, raw_bytes, read_pieces
from castalia.distributed.boxes import Box

DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPES.values()}
"""safetensors' code -> torch's dtype."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read as the umask says."""
    # The library renames a temporary file of mode 0600 to `path`, so the mode is taken from a file
    # that Python has made there.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file of tensors that are made one after the other, all in `dtype`.

    The bytes are those of `save_tensors`, without all tensors in memory at once.
    Takes   shapes: of all tensors by name. make: a tensor by its name, in any dtype.
    """
    # The library orders tensors of one dtype by name.
    names = sorted(shapes)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin = end
        end += math.prod(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[NAMES[dtype]][1],
            "shape": list(shapes[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make(name).detach().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shapes[name]), name
            file.write(raw_bytes(tensor))


class StoredTensor(Protocol):
    """One tensor on a disk. Indexing with a slice for each dimension reads that part and no
    more."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        """A part of it on the CPU."""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, read from the disk at each access.

    `tensors[name]` is a whole tensor, `tensors.stored(name)[slices]` a part of one.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], lock: Any = None) -> None:
        self.tensors = tensors
        self.lock = lock
        """An open file whose lock must last as long as the tensors may be read."""

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor[tuple(slice(0, size) for size in tensor.shape)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def stored(self, name: str) -> StoredTensor:
        """The tensor `name` as it is stored, not read yet."""
        return self.tensors[name]

    def row(self, name: str, number: int) -> Tensor:
        """`self[name][number]`, without the other rows."""
        tensor = self.tensors[name]
        rest = tuple(slice(0, size) for size in tensor.shape[1:])
        return tensor[slice(number, number + 1), *rest][0]


def checkpoint_tensors(folder: Path, manifest: Manifest, prefix: str = "model.") -> StoredTensors:
    """The tensors of a checkpoint whose names begin with `prefix`, which is taken off.

    No retention policy deletes the checkpoint as long as the result lives. Hashes are not checked
    here.
    """
    tensors = {
        name.removeprefix(prefix): CheckpointTensor(folder, entry)
        for name, entry in manifest.tensors.items()
        if name.startswith(prefix)
    }
    return StoredTensors(tensors, hold(folder))


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint, put together from the pieces that the saving ranks wrote."""

    folder: Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return DTYPES[self.entry.dtype][0]

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        box = box_of(part, self.shape)
        out = torch.empty(box.shape, dtype=self.dtype)
        for chunk in self.entry.chunks:
            common = box.intersection(chunk.box)
            if common.volume:
                target = out[common.slices_from(box.offset)]
                part_of_chunk = ChunkPart(chunk, self.entry.dtype, common, target)
                read_pieces(self.folder / chunk.file, [part_of_chunk])
        return out


@dataclass(frozen=True)
class FileTensor:
    """A tensor of one safetensors file under a name of another library."""

    file: Path
    key: str
    stored_shape: tuple[int, ...]
    code: str
    """safetensors' name of the dtype."""
    transform: Transform = field(default_factory=Transform)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor in Castalia's layout."""
        if self.transform.copies:
            return self.stored_shape
        meta = torch.empty(self.stored_shape, dtype=self.dtype, device="meta")
        return tuple(self.transform.back(meta).shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return DTYPE_OF_CODE[self.code]

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        if self.transform.copies:
            return self.read(part or None)
        # A transform may move any element anywhere, so it needs the whole tensor.
        return self.transform.back(self.read())[part].clone()

    def read(self, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor as it is stored, or a part of it."""
        # Opened anew for each part: parsing the header is cheap beside the read, and no file stays
        # open for the life of a run.
        with opened(self.file) as file:
            out: Tensor = (
                file.get_tensor(self.key) if part is None else file.get_slice(self.key)[part]
            )
            return out


@dataclass(frozen=True)
class StackedTensor:
    """Tensors of one shape as one with a dim more in front, such as the experts of a layer. A part
    reads those that it needs and no more."""

    rows: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""
        return (len(self.rows), *self.rows[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.rows[0].dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        box = box_of(part, self.shape)
        out = torch.empty(box.shape, dtype=self.dtype)
        for place, row in enumerate(self.rows[box.slices[0]]):
            out[place] = row[part[1:]]
        return out


def tensors_of_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by their names there, not read yet.

    Raises  DamagedCheckpointError if the file is not whole.
    """
    out = {}
    try:
        with opened(path) as file:
            for key in sorted(file.keys()):
                stored = file.get_slice(key)
                out[key] = FileTensor(path, key, tuple(stored.get_shape()), stored.get_dtype())
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}; copy the file again") from None
    return out


def box_of(part: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box that a slice for each dimension of `shape` selects; steps are 1."""
    ranges = [item.indices(size) for item, size in zip(part, shape, strict=True)]
    offset = tuple(start for start, _, _ in ranges)
    return Box(offset, tuple(max(0, stop - start) for start, stop, _ in ranges))
