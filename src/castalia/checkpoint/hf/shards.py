"""Weights of a Hugging Face folder, written tensor by tensor into one file or into shards.

Names, index and division are those of transformers' `save_pretrained`, whose readers find the
shards by the index.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from castalia.checkpoint.hf.weights import SAFETENSORS, SAFETENSORS_INDEX
from castalia.checkpoint.tensors import stream_tensors
from castalia.core.errors import ConfigError
from castalia.core.files import atomic_write

MAX_SHARD_SIZE = "5GB"
"""transformers' own default."""
PREFIXES = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
"""Powers of ten, as in huggingface_hub's `parse_size_to_int`."""


def shard_bytes(size: str) -> int:
    """Bytes of a size such as 5GB or 500MB.

    Raises  ConfigError if it is not a positive number with a unit.
    """
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B\s*", size.upper())
    count = int(float(parts[1]) * PREFIXES[parts[2]]) if parts else 0
    if not count:
        raise ConfigError(
            f"max_shard_size {size!r}: expected a size such as {MAX_SHARD_SIZE} or 500MB, with"
            " K, M, G or T for powers of ten"
        )
    return count


def divided(sizes: Mapping[str, int], largest: int) -> dict[str, list[str]]:
    """Which tensors each file holds, by the file's name.

    Takes   sizes: bytes of each tensor in the order of the model. largest: bytes of a shard; a
            tensor beyond it has a shard of its own.
    Source  huggingface_hub, serialization/_base.py, split_state_dict_into_shards_factory.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > largest:
            # As there, it comes before the shard that is being filled.
            shards.append([name])
            continue
        if filled + size > largest:
            shards.append(current)
            current = []
            filled = 0
        current.append(name)
        filled += size
    if current:
        shards.append(current)
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    stem = SAFETENSORS.removesuffix(".safetensors")
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write model.safetensors, or its shards and their index; one tensor is in memory at a time.

    Takes   shapes: of all tensors by name, in the order of the model. make: a tensor by its name,
            in any dtype.
    Raises  ConfigError for a wrong size.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: count * dtype.itemsize for name, count in counts.items()}
    files = divided(sizes, shard_bytes(max_shard_size))
    for file, names in files.items():
        parts = {name: shapes[name] for name in names}
        # Without the metadata transformers refuses the file.
        stream_tensors(folder / file, parts, make, dtype, {"format": "pt"})
    if len(files) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(counts.values()),
            "total_size": sum(sizes.values()),
        },
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    with atomic_write(folder / SAFETENSORS_INDEX) as out:
        out.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
