"""What one folder or file is as a model: its step, its variant, and a hash of its weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from castalia.checkpoint.find import find_checkpoint
from castalia.checkpoint.hf import is_hf_folder
from castalia.checkpoint.manifest import MANIFEST, read_manifest
from castalia.checkpoint.names import COMPLETE
from castalia.core.hub import is_hub_id
from castalia.eval.labels import STEP_FOLDER
from castalia.formats.export_record import RECORD, read_record
from castalia.formats.foreign import is_foreign
from castalia.inference.exported import CHECKPOINTS

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLED_BYTES = 1 << 20
"""Bytes at the begin and the end of each file of weights that are hashed. Training changes every
weight, so they tell checkpoints apart without a pass over terabytes."""
EXACT = "fp32"
"""Numbers of an export that loses nothing."""


def is_alone(path: Path) -> bool:
    """Whether a path is itself one model: an export, an import, a step, a foreign model."""
    if (path / COMPLETE).is_file() or (path / RECORD).is_file():
        return True
    if path.is_file() and path.suffix == ".gguf":
        return True
    return path.is_dir() and (is_hf_folder(path) or (is_foreign(path) and not steps_in(path)))


def steps_in(folder: Path) -> dict[int, str]:
    """The sub-folders that are checkpoints named after their steps."""
    steps: dict[int, str] = {}
    for item in folder.iterdir() if folder.is_dir() else ():
        named = STEP_FOLDER.fullmatch(item.name)
        if named is not None and item.is_dir() and (is_alone(item)):
            steps[int(named[1])] = str(item)
    return dict(sorted(steps.items()))


def record_of(path: str) -> dict[str, Any] | None:
    """The record of an export, of its folder or its GGUF file; None for anything else."""
    if is_hub_id(path):
        return None
    if path.endswith(".gguf"):
        folder = Path(path).parent
    else:
        folder = Path(path)
    # Whoever loads the model checks the record.
    if (folder / RECORD).is_file():
        return read_record(folder, check=False)
    return None


def recorded_step(place: Path) -> int | None:
    """The step that an export or an import was made of; None where no record says it."""
    record = record_of(str(place))
    if record is not None:
        step = record.get("step")
        if isinstance(step, int):
            return step
        return None
    if (place / COMPLETE).is_file():
        return read_manifest(place).step
    return None


def variant_of(path: str) -> str:
    """How the weights of a checkpoint-like export differ from their checkpoint's."""
    record = record_of(path)
    if record is None or record["to"] not in CHECKPOINTS or record["numbers"] == EXACT:
        return ""
    return f"{record['numbers']} weights"


def hash_of(path: str) -> str | None:
    """SHA-256 of what identifies the weights at a path, 16 digits; None for a hub id."""
    if is_hub_id(path):
        return None
    place = Path(path)
    if not is_alone(place):
        place = find_checkpoint(place)
    if (place / COMPLETE).is_file():
        # The hash of the manifest, which has the hash of every file.
        return hashlib.sha256((place / COMPLETE).read_bytes()).hexdigest()[:16]
    record = record_of(str(place))
    if record is not None and record["to"] in CHECKPOINTS and record["numbers"] == EXACT:
        manifest = record.get("source_sha256", {}).get(MANIFEST)
        if manifest:  # the weights of a checkpoint, as they are
            # COMPLETE holds this hash and a line break.
            return hashlib.sha256(f"{manifest}\n".encode()).hexdigest()[:16]
    return sampled_hash(weight_files(place))


def weight_files(place: Path) -> list[Path]:
    """The files of weights of a model that is no checkpoint of a run."""
    if not place.is_dir():
        return [place]
    return sorted(file for file in place.iterdir() if file.suffix in WEIGHTS)


def weight_bytes(path: str) -> int:
    """Bytes of the files of weights; 0 for a hub id."""
    place = Path(path)
    if place.exists():
        return sum(file.stat().st_size for file in weight_files(place))
    return 0


def sampled_hash(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and both ends of files, 16 digits."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, size - SAMPLED_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:16]
