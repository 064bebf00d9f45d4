"""Reading a checkpoint, whole or the slices of this rank. Hashes are checked first; nothing is
unpickled."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from castalia.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    STATE,
    DamagedCheckpointError,
    Manifest,
    TensorEntry,
    check_files,
    parse_json,
    read_listed,
    read_manifest,
    reading,
)
from castalia.checkpoint.names import COMPLETE
from castalia.checkpoint.shards import ChunkPart, check_pieces, read_pieces
from castalia.config.anchor import CONFIG
from castalia.core.errors import CheckpointError, nearest
from castalia.core.sealed import READERS
from castalia.distributed.boxes import local_boxes

Pieces = dict[str, list[ChunkPart]]
"""Chunk parts to read, by file."""
SHARD = ".safetensors"
"""Suffix of the files of tensors; all others are small texts."""
NOWHERE = torch.empty(0)
"""Target of a part that is checked and not read."""


@dataclass(frozen=True)
class Ready:
    """A checkpoint that was checked, as far as this rank needs it, and fits the tensors it will
    fill."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    pieces: Pieces

    def fill(self) -> dict[str, Any]:
        """Copy the values into the tensors, in place; returns the state."""
        read_files(self.path, self.pieces)
        return self.state


def load_into(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    elsewhere: Collection[str] = (),
) -> dict[str, Any]:
    """Copy the checkpoint's values into `tensors`, in place, and return the saved state.

    Only names that begin with `prefix` count, on both sides; names, shapes and dtypes must agree
    exactly. `elsewhere` names tensors that other ranks alone load. Any layout will do: each rank
    reads the slices that it holds, and checks the hash of each file that it reads and of the texts
    beside them.
    Raises  DamagedCheckpointError naming the file; CheckpointError listing names, shapes and
            dtypes that do not fit. Nothing in `tensors` has changed then.
    """
    path = Path(path)
    # The lock spans check and copy: a checkpoint deleted in between would be half loaded.
    with reading(path):
        return make_ready(path, tensors, prefix, elsewhere).fill()


def make_ready(
    path: Path, tensors: Mapping[str, Tensor], prefix: str = "", elsewhere: Collection[str] = ()
) -> Ready:
    """Make every check of load_into and change nothing yet; `elsewhere` names tensors of other
    ranks."""
    manifest = read_manifest(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    elsewhere = [name for name in elsewhere if name.startswith(prefix)]
    # Names and shapes first: they are in memory, while the hashes take a pass over the files.
    require_fit(path, manifest, tensors, prefix, elsewhere)
    pieces = pieces_of(manifest, tensors)
    texts = [name for name in manifest.files if not name.endswith(SHARD)]
    # Not needed by the run, but an export of this step will read them.
    check_files(path, manifest, texts)
    check_contents(path, manifest, pieces)
    return Ready(path, manifest, state_of(path, manifest), pieces)


def check_contents(path: Path, manifest: Manifest, pieces: Pieces) -> None:
    """Check the hashes of the files of `pieces`, and their headers against the manifest."""
    check_files(path, manifest, pieces)
    # A hash vouches for the bytes, not for their agreement with the manifest beside them.
    for file in sorted(pieces):
        check_pieces(path / file, pieces[file])


def check_tensors(path: Path, manifest: Manifest, prefix: str) -> None:
    """Check the files of all tensors whose names begin with `prefix`: their hashes and their own
    headers.

    Raises  DamagedCheckpointError naming the file; CheckpointError if no name begins with the
            prefix.
    """
    entries = entries_of(path, manifest, prefix)
    check_contents(path, manifest, stored_pieces(entries))


def read_files(path: Path, pieces: Pieces) -> None:
    """Copy parts of the files to their targets, several files at a time, each opened once."""
    order = sorted(pieces, key=lambda file: -sum(part.target.nbytes for part in pieces[file]))
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda file: read_pieces(path / file, pieces[file]), order):
            pass


def stored_pieces(entries: Mapping[str, TensorEntry]) -> Pieces:
    """Every stored piece of the tensors, by file, to be checked and not read."""
    pieces: Pieces = defaultdict(list)
    for entry in entries.values():
        for chunk in entry.chunks:
            pieces[chunk.file].append(ChunkPart(chunk, entry.dtype, chunk.box, NOWHERE))
    return pieces


def entries_of(path: Path, manifest: Manifest, prefix: str) -> dict[str, TensorEntry]:
    """The tensors whose names begin with `prefix`.

    Raises  CheckpointError if there are none.
    """
    entries = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    if not entries:
        groups = sorted({name.split(".")[0] for name in manifest.tensors})
        raise CheckpointError(
            f"{path} has no tensor named {prefix}*; it has: {', '.join(groups) or 'no tensors'}"
        )
    return entries


def require_fit(
    path: Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    prefix: str,
    elsewhere: Collection[str],
) -> None:
    """Raise CheckpointError listing names, shapes and dtypes that differ from the checkpoint's."""
    have = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    wanted = tensors.keys() | set(elsewhere)
    problems = [
        f"{name} is not in the checkpoint{nearest(name, have)}"
        for name in sorted(wanted - have.keys())
    ]
    problems += [f"{name} is in the checkpoint only" for name in sorted(have.keys() - wanted)]
    for name in sorted(have.keys() & tensors.keys()):
        entry = have[name]
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        # No silent conversion: a bf16 moment in place of an fp32 one would change the run.
        if tuple(tensor.shape) != entry.shape:
            problems.append(
                f"{name} has shape {list(entry.shape)} in the checkpoint, {list(tensor.shape)} here"
            )
        elif tensor.dtype != DTYPES[entry.dtype][0]:
            problems.append(f"{name} is {entry.dtype} in the checkpoint, {dtype} here")
        elif tensor.is_meta:
            problems.append(f"{name} has no memory to load into (meta device)")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:8])
        raise CheckpointError(
            f"{path} does not fit this model or optimizer; use its own config:{listed}{more}"
        )


def pieces_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Pieces:
    """The parts to read from each file to fill the local tensors."""
    pieces: Pieces = defaultdict(list)
    for name, tensor in tensors.items():
        with torch.no_grad():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        entry = manifest.tensors[name]
        for box, place in local_boxes(tensor):
            mine = local[place.slices]
            for chunk in entry.chunks:
                # Saved and loading layout are independent, so any chunk may meet any local box.
                part = box.intersection(chunk.box)
                if part.volume:
                    target = mine[part.slices_from(box.offset)]
                    pieces[chunk.file].append(ChunkPart(chunk, entry.dtype, part, target))
    return pieces


def state_of(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The saved state of a checkpoint whose manifest is known."""
    state = parse_json(read_listed(path, manifest, STATE), path / STATE)
    if not isinstance(state, dict):
        raise DamagedCheckpointError(
            f"{path / STATE} is malformed: expected a JSON object, got {type(state).__name__}"
        )
    return state


def read(path: str | Path, prefix: str = "model.") -> dict[str, Tensor]:
    """Whole CPU tensors of each name that begins with `prefix`, which is taken off.

    Raises  DamagedCheckpointError naming the file; CheckpointError if no name begins with the
            prefix.
    """
    path = Path(path)
    with reading(path):
        manifest = read_manifest(path)
        entries = entries_of(path, manifest, prefix)
        tensors = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype][0])
            for name, entry in entries.items()
        }
        pieces = pieces_of(manifest, tensors)
        check_contents(path, manifest, pieces)
        read_files(path, pieces)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_state(path: str | Path) -> dict[str, Any]:
    """The state that was saved with the tensors, such as progress, loss scale and data
    fingerprint.

    Raises  CheckpointError if the step's files are missing or damaged.
    """
    return state_of(Path(path), read_manifest(Path(path)))


def read_config(path: str | Path) -> dict[str, Any]:
    """The run's config as it was saved, for RunConfig or one of its sections.

    Raises  CheckpointError if the step's files are missing or damaged.
    """
    try:
        # safe_load builds plain values only; a full loader could construct any object.
        values = yaml.safe_load(read_text(path, CONFIG))
    except yaml.YAMLError as error:
        raise DamagedCheckpointError(
            f"{Path(path) / CONFIG} is not readable YAML: {error}"
        ) from None
    if not isinstance(values, dict):
        raise DamagedCheckpointError(
            f"{Path(path) / CONFIG} is malformed: expected a mapping, got {type(values).__name__}"
        )
    return values


def read_text(path: str | Path, name: str) -> str:
    """A text file of the checkpoint, for instance tokenizer.json; its hash is checked."""
    path = Path(path)
    manifest = read_manifest(path)
    if name not in manifest.files:
        raise CheckpointError(
            f"{path} has no {name}; its files are {', '.join(sorted(manifest.files))}"
        )
    return read_listed(path, manifest, name).decode("utf-8")


def read_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(weights by Decoder.state_dict() names, config, state) of a checkpoint folder.

    Raises  CheckpointError if the step's files are missing or damaged.
    """
    return read(path), read_config(path), read_state(path)


def verify(path: str | Path) -> list[str]:
    """Check COMPLETE, the manifest, every hash and every stored tensor; returns names of unlisted
    files.

    Raises  DamagedCheckpointError naming the first file that is missing or changed.
    """
    path = Path(path)
    with reading(path):
        manifest = read_manifest(path)
        check_files(path, manifest, manifest.files)
        state_of(path, manifest)
        pieces = stored_pieces(manifest.tensors)
        for file in sorted(pieces):
            check_pieces(path / file, pieces[file])
        return sorted(
            {item.name for item in path.iterdir()} - {COMPLETE, MANIFEST, *manifest.files}
        )
