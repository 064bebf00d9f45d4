"""A model as a checkpoint of Castalia's own, written file by file: one shard is in memory at a
time."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.checkpoint.manifest import Chunk, FileEntry, TensorEntry
from castalia.checkpoint.names import step_name
from castalia.checkpoint.save import Note, RankSave, texts_of
from castalia.checkpoint.shards import NAMES, write_shard
from castalia.checkpoint.stage import require_json
from castalia.checkpoint.store import Store, require_file_names
from castalia.checkpoint.tensors import StoredTensors
from castalia.core.errors import CheckpointError

SHARD_BYTES = 1 << 30
"""Bytes of tensors that are read before a file is written and they are let go."""
GROUP = "model"


class StreamedSave(RankSave):
    """A save whose tensors are read as they are written."""

    def stream(self, tensors: StoredTensors, dtype: torch.dtype | None) -> None:
        """Write the checkpoint of these weights, in `dtype` or that which they have.

        Raises  CheckpointError if it cannot be written, or a tensor cannot be stored.
        """
        self.tensors = tensors
        self.dtype = dtype
        self.run()

    def write_shards(self) -> Note:
        """See `RankSave`."""
        note = Note(save=self.mark)
        held: dict[str, Tensor] = {}
        for name in self.tensors:
            tensor = self.tensors[name].contiguous()
            if self.dtype is not None:
                tensor = tensor.to(self.dtype)
            if tensor.dtype not in NAMES:
                raise CheckpointError(f"cannot save {name}: unknown dtype {tensor.dtype}")
            size = sum(each.nbytes for each in held.values())
            if held and size + tensor.nbytes > SHARD_BYTES:
                self.close(note, held)
                held = {}
            held[f"{GROUP}.{name}"] = tensor
        self.close(note, held)
        return note

    def close(self, note: Note, held: Mapping[str, Tensor]) -> None:
        """Write one file and enter it and its tensors into the note."""
        number = len(note.files)
        file = f"{GROUP}-{self.rank:05d}{f'-{number}' if number else ''}.safetensors"
        self.own_files.append(file)
        entry: FileEntry = write_shard(self.temporary / file, held)
        note.files[file] = entry
        for name, tensor in held.items():
            shape = tuple(tensor.shape)
            chunk = Chunk(file=file, key=name, offset=(0,) * len(shape), shape=shape)
            note.tensors[name] = TensorEntry(dtype=NAMES[tensor.dtype], shape=shape, chunks=[chunk])


def copy_model(
    folder: Path,
    step: int,
    tensors: StoredTensors,
    state: Mapping[str, Any],
    files: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the checkpoint of `step` into the checkpoints folder `folder`; returns its folder.

    Takes   state and files as `Store.save` does; dtype: of the stored weights, else their own.
    Raises  CheckpointError if it cannot be written.
    """
    require_json(dict(state))
    require_file_names(files)
    texts = texts_of(json.dumps(dict(state), indent=1) + "\n", files)
    store = Store(folder)
    mark = f"{random.SystemRandom().getrandbits(62):x}-1"
    save = StreamedSave(folder, step, mark, 0, 1, {}, texts, store.patience)
    with store.writing():
        store.sweep(save)
        save.stream(tensors, dtype)
    return folder / step_name(step)
