"""The weights of a Hugging Face folder under their own names, not read yet.

One file or shards with an index, safetensors or pickles of tensors; where a folder has several of
these, the one that transformers would load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from castalia.checkpoint.manifest import DTYPES
from castalia.checkpoint.pickled import read_pickled
from castalia.checkpoint.shards import NAMES
from castalia.checkpoint.tensors import FileTensor, tensors_of_file
from castalia.core.errors import CheckpointError
from castalia.core.files import read_json

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ORDER = (SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX)
"""The names that weights may have, the first one found is taken.

Source  transformers, modeling_utils.py, _get_resolved_checkpoint_files.
"""
HEAD_ROWS = 4096
"""Rows of two matrices that are compared at a time: 67 MB of fp32 at a width of 4096."""


@dataclass(frozen=True, eq=False)
class PickledTensor(FileTensor):
    """A tensor of a pickled file, mapped into memory."""

    content: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def read(self, part: tuple[slice, ...] | None = None) -> Tensor:
        """See `FileTensor`."""
        # A copy, as safetensors gives one: the file may be replaced while the model lives.
        return (self.content if part is None else self.content[part]).clone()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights: one file, or the shards that an index names.

    Raises  CheckpointError if there are none, or a shard is missing.
    """
    for name in ORDER:
        if (folder / name).is_file():
            index = folder / name
            shards = set(index_of(index).values()) if name.endswith(".json") else {name}
            return [shard_of(folder, shard) for shard in sorted(shards)]
    raise CheckpointError(
        f"{folder} has no {' or '.join(ORDER)}, only {names_in(folder)}; Castalia reads these"
    )


def index_of(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index names it.

    Raises  CheckpointError if the index has no such table.
    """
    table = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} has no weight_map of tensors and files; copy it again")
    return {str(key): str(name) for key, name in table.items()}


def shard_of(folder: Path, name: str) -> Path:
    """A file that the folder must have.

    Raises  CheckpointError if it does not.
    """
    file = folder / name
    # A name in the index must not lead out of the folder, which may come from anywhere.
    if file.parent != folder or not file.is_file():
        raise CheckpointError(
            f"{folder} has no {name}, only {names_in(folder)}; copy the missing shard"
        )
    return file


def names_in(folder: Path) -> str:
    """The names of a folder's files between commas."""
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def stored_weights(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of the folder by its name there.

    Raises  CheckpointError if a file is missing, is not whole, holds more than tensors, or holds a
            tensor that another one holds too, or that its index places elsewhere.
    """
    tensors: dict[str, FileTensor] = {}
    for path in weight_files(folder):
        in_file = pickled_tensors(path) if path.suffix == ".bin" else tensors_of_file(path)
        for key, tensor in in_file.items():
            if key in tensors:
                other = tensors[key].file.name
                raise CheckpointError(
                    f"{folder} has {key!r} twice, in {other} and in {path.name}; which one counts"
                    " is unknown: copy the model again"
                )
            tensors[key] = tensor
    require_indexed(folder, tensors)
    return tensors


def require_indexed(folder: Path, tensors: Mapping[str, FileTensor]) -> None:
    """Raises  CheckpointError if the index names a tensor that its shard lacks."""
    # Without one file for all there is an index, and of two kinds the first is the one in use.
    names = [name for name in ORDER if (folder / name).is_file()]
    if not names[0].endswith(".json"):
        return
    for key, name in index_of(folder / names[0]).items():
        if key not in tensors or tensors[key].file.name != name:
            raise CheckpointError(
                f"{folder / names[0]} places {key!r} in {name}, which does not hold it; copy"
                " the model again"
            )


def pickled_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a pickled file.

    Raises  CheckpointError if it holds anything else.
    """
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected names and tensors, got a {type(content).__name__}")
    tensors: dict[str, FileTensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor) or value.dtype not in NAMES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {key!r} is a {kind}, not a tensor of weights")
        code = DTYPES[NAMES[value.dtype]][1]
        tensors[str(key)] = PickledTensor(path, str(key), tuple(value.shape), code, content=value)
    return tensors


def equal_tensors(one: FileTensor, other: FileTensor) -> bool:
    """Whether two stored matrices hold the same numbers; some rows are in memory at a time."""
    if one.stored_shape != other.stored_shape:
        return False
    rows = one.stored_shape[0]
    for start in range(0, rows, HEAD_ROWS):
        part = (slice(start, min(start + HEAD_ROWS, rows)), slice(None))
        if not torch.equal(one.read(part), other.read(part)):
            return False
    return True
