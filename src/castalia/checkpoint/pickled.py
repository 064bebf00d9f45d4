"""Pickled weights of other libraries: tensors alone are read, and no code of a file is ever run."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.checkpoint.manifest import DamagedCheckpointError
from castalia.core.errors import CheckpointError

NAMED = re.compile(r"GLOBAL (\S+)")
"""How torch's refusal names the function or class that the file asks for."""
MAKE_ARRAY = np.zeros(0).__reduce__()[0]
ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    MAKE_ARRAY,
    # The same function in the files of numpy 1.
    (MAKE_ARRAY, "numpy.core.multiarray._reconstruct"),
]
"""Arrays of numbers. GPT-NeoX saves the state of numpy's generator beside the weights."""


def read_pickled(path: Path) -> Any:
    """The content of a `.bin`, `.pt` or `.pth` file: tensors in plain containers, on the CPU.

    A zip archive, torch's format since 1.6, is mapped into memory: a tensor is read from the disk
    when its elements are used. An older file is read whole.
    Raises  CheckpointError if the pickle asks for anything but tensors and plain values;
            DamagedCheckpointError if the file is not whole.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(ARRAYS):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(refusal(path, str(error))) from None
    # A broken file makes torch, zipfile and the pickle machine raise errors of a dozen kinds.
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        # torch goes on for a paragraph after the sentence that says what broke.
        first = first.split(". ")[0]
        raise DamagedCheckpointError(f"{path} is corrupt: {first}; copy the file again") from None


def refusal(path: Path, reason: str) -> str:
    """The user's sentence for a pickle that torch refused."""
    named = NAMED.search(reason)
    asks = f"the pickle in it asks for {named[1]}" if named else "it is no pickle of tensors"
    return (
        f"{path} is refused: {asks}, and weights are tensors alone; nothing in it was run; get the"
        " model as safetensors, or save its state_dict again where you trust the file"
    )
