"""The compiled part of the native engine: step.cpp at this machine's level, through ctypes.

Without a library the engine runs on torch's operators: the same numbers up to rounding, in slower
steps; see castalia.core.native_code.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.core.native_code import lend_threads, native_library
from castalia.native.packing import PANEL, Packed

SOURCE = Path(__file__).with_name("step.cpp")
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""Storages that the compiled kernels read, with their numbers in step.cpp."""

Pointer = ctypes.c_void_p
Long = ctypes.c_int64


class CLinear(ctypes.Structure):
    """`Linear` of step.cpp."""

    _fields_ = [
        ("weight", Pointer),
        ("scale", Pointer),
        ("bias", Pointer),
        ("n", Long),
        ("k", Long),
        ("kind", Long),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where they cannot be built.

    Raises  ConfigError if CASTALIA_ISA names no level.
    """
    built = native_library(SOURCE, "the native kernels", "torch's are used")
    return None if built is None else declared(built)


def level() -> str | None:
    """The instructions that the compiled step uses, as in castalia.core.levels; None without it."""
    loaded = library()
    return None if loaded is None else str(loaded.castalia_level().decode())


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    # Without them ctypes passes integers as 32 bits and cuts addresses.
    loaded.castalia_linear.argtypes = [Pointer, Pointer, Long, Pointer, Long, ctypes.c_int]
    loaded.castalia_forward.argtypes = [Pointer, Pointer, Pointer, ctypes.c_int]
    loaded.castalia_choose.argtypes = [Pointer, Pointer, Pointer, Pointer, ctypes.c_int]
    loaded.castalia_level.restype = ctypes.c_char_p
    lend_threads(loaded)
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's first number; null for None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def c_linear(packed: Packed) -> CLinear:
    """A layer as step.cpp reads it; valid while the tensors of `packed` exist."""
    # The library works on whole panels; the padding's products are never stored.
    rows = -(-packed.channels // PANEL) * PANEL
    return CLinear(
        address(packed.weight),
        address(packed.scale),
        address(packed.bias),
        rows,
        packed.inputs,
        KINDS[packed.storage],
    )


def multiply(native: Any, layer: CLinear, x: Tensor, channels: int) -> Tensor:
    """x (M, K) float32 through a layer -> (M, channels) float32, on torch's number of threads."""
    # The library reads rows from bare memory.
    x = x.contiguous()
    y = torch.empty(len(x), channels)
    failed = native.castalia_linear(
        ctypes.byref(layer), x.data_ptr(), len(x), y.data_ptr(), channels, torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"no memory for a product of {len(x)} rows")
    return y
