"""The manifest of a checkpoint: its tensors, files and hashes, and every check of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, ValidationError

from castalia.checkpoint.names import COMPLETE, STEP_NAME
from castalia.checkpoint.tiling import fault_of_tiling
from castalia.config.base import Config
from castalia.core.errors import CheckpointError
from castalia.core.files import locked
from castalia.core.sealed import READERS, Seal, fault_of_file, open_regular
from castalia.distributed.boxes import Box

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
LARGEST_JSON = 1 << 28
"""Bytes above which a manifest or state file is refused unread; Pythia-12B on 64 ranks has under
10 MB."""

DTYPES = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int16": (torch.int16, "I16"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}
"""Name in the manifest -> torch's dtype and safetensors' code."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete, or one of its files was changed."""


class FileEntry(Config):
    """Size and hash of a file."""

    size: NonNegativeInt
    """Bytes."""
    sha256: str
    """Hex SHA-256 of the bytes that were handed to the system for writing."""


class Chunk(Config):
    """One stored piece of a tensor."""

    file: str
    """Name of the safetensors file."""
    key: str
    """Name of the piece in that file."""
    offset: tuple[NonNegativeInt, ...]
    """Index in the whole tensor where the piece begins, one number a dimension."""
    shape: tuple[NonNegativeInt, ...]
    """Size of the piece."""

    @property
    def box(self) -> Box:
        """Where the piece lies."""
        return Box(self.offset, self.shape)


class TensorEntry(Config):
    """One tensor: together its chunks cover it exactly once; a tensor without elements has none."""

    dtype: str
    """Key of DTYPES."""
    shape: tuple[NonNegativeInt, ...]
    """Size of the whole tensor."""
    chunks: list[Chunk]
    """Where it is stored."""


class Manifest(Config):
    """Everything in a checkpoint except the numbers; its own hash is the content of COMPLETE."""

    format: int
    """Version of this table, FORMAT."""
    castalia: str
    """Version that wrote it."""
    torch: str
    """PyTorch that wrote it."""
    step: NonNegativeInt
    """Optimizer steps done."""
    world: NonNegativeInt
    """World size that wrote it."""
    save: str
    """Mark of the one save that made it; ranks recognize their own save by it."""
    tensors: dict[str, TensorEntry]
    """By name."""
    files: dict[str, FileEntry]
    """By file name: every file but the manifest and COMPLETE."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, checked against COMPLETE and for consistency.

    No other file is opened.

    Raises  DamagedCheckpointError naming the file, if one is missing, changed or malformed.
    """
    # COMPLETE holds the manifest's hash and the manifest every other hash: one chain of trust.
    mark = read_regular(folder / COMPLETE, 1000)
    text = read_regular(folder / MANIFEST, LARGEST_JSON)
    if mark != completion_mark(text):
        raise DamagedCheckpointError(
            f"{folder / MANIFEST} does not have the hash in {COMPLETE}; one of the two is corrupt"
        )
    table = parse_json(text, folder / MANIFEST)
    # The format comes first: a newer manifest would fail validation with a misleading message.
    if isinstance(table, dict) and table.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {table.get('format')!r}, this Castalia reads {FORMAT};"
            f" install the version that wrote it ({table.get('castalia', 'not named')})"
        )
    try:
        manifest = Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DamagedCheckpointError(
            f"{folder / MANIFEST} is malformed at {place or 'the top'}: {first['msg']}"
        ) from None
    if fault := fault_of_table(manifest, folder.name):
        raise DamagedCheckpointError(f"{folder / MANIFEST} is malformed: {fault}")
    return manifest


def completion_mark(manifest_text: bytes) -> bytes:
    """Content of COMPLETE for a manifest of these bytes."""
    return hashlib.sha256(manifest_text).hexdigest().encode() + b"\n"


def fault_of_table(manifest: Manifest, folder_name: str) -> str | None:
    """Why the manifest is malformed: unsafe file name, wrong step, or a tensor not covered; or
    None."""
    for name in manifest.files:
        if not SAFE_NAME.fullmatch(name) or name in (MANIFEST, COMPLETE):
            # Names come from a file that someone may have forged: none may lead out of the folder.
            return f"{name!r} is not a valid file name in a checkpoint"
    if STATE not in manifest.files:
        return f"it lists no {STATE}"
    # A copied folder under another step would be resumed at the wrong position in the data.
    named = STEP_NAME.fullmatch(folder_name)
    if named and int(named[1]) != manifest.step:
        return (
            f"it is of step {manifest.step}, in a folder named {folder_name};"
            " the folder was copied or renamed"
        )
    for name, entry in manifest.tensors.items():
        if fault := fault_of_entry(entry, manifest.files):
            return f"tensor {name!r}: {fault}"
    return None


def fault_of_entry(entry: TensorEntry, files: Iterable[str]) -> str | None:
    """Why one tensor's entry is wrong, or None."""
    if entry.dtype not in DTYPES:
        return f"unknown dtype {entry.dtype!r}"
    for chunk in entry.chunks:
        if chunk.file not in files:
            return f"its file {chunk.file!r} is not listed"
        if 0 in chunk.shape:
            return "an empty piece"
    return fault_of_tiling(entry.shape, [chunk.box for chunk in entry.chunks])


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the named files and compare size and SHA-256 with the manifest.

    Raises  DamagedCheckpointError naming the first file, by name, that is missing, a link or
            changed.
    """
    # The largest first: one that begins last would keep the others waiting.
    order = sorted(names, key=lambda name: (-manifest.files[name].size, name))
    with ThreadPoolExecutor(READERS) as pool:
        faults = pool.map(
            lambda name: fault_of_entry_file(folder / name, manifest.files[name]), order
        )
        found = dict(zip(order, faults, strict=True))
    for name in sorted(found):
        if fault := found[name]:
            raise DamagedCheckpointError(fault)


def fault_of_entry_file(path: Path, entry: FileEntry) -> str | None:
    """Why the file differs from its entry, or None."""
    return fault_of_file(path, Seal(entry.sha256, entry.size))


def open_plain(path: Path) -> Any:
    """Open a plain file of a checkpoint for reading in binary.

    Raises  DamagedCheckpointError if the file is missing, a link or not a plain file.
    """
    return open_regular(path, DamagedCheckpointError, "a checkpoint")


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a plain file of at most `limit` bytes."""
    try:
        with open_plain(path) as file:
            # One byte beyond the limit shows that there are more.
            data: bytes = file.read(limit + 1)
    except OSError as error:
        raise DamagedCheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise DamagedCheckpointError(f"{path} is corrupt: it has more than {limit} bytes")
    return data


def read_listed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Bytes of a small listed file. The same bytes are hashed and returned: no second read to race
    with."""
    entry = manifest.files[name]
    data = read_regular(folder / name, min(entry.size, LARGEST_JSON))
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedCheckpointError(
            f"{folder / name} is corrupt: its SHA-256 is not the saved one"
        )
    return data


def parse_json(data: bytes, path: Path) -> Any:
    """The value in a JSON file."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not readable JSON: {error}") from None


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted by a retention policy inside the block."""
    with hold(folder):
        yield


def hold(folder: Path) -> Any:
    """A file under a shared lock: while it is open, no retention policy deletes the checkpoint in
    `folder`."""
    file = open_plain(folder / COMPLETE)
    locked(file, shared=True)
    return file
