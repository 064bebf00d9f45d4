"""The compiled functions of attention, fused_attention.cpp, and what they compute."""

import ctypes
import functools
from pathlib import Path

from castalia.core.levels import levels_here
from castalia.core.native_code import lend_threads, native_library

SOURCE = Path(__file__).with_name("fused_attention.cpp")
SLOW_LEVELS = ("x86-64-v2",)
"""Without a product and sum in one instruction it is no faster than torch's operators."""
WIDEST = 256
"""Numbers of a head, at most; the library has room for a row of so many."""
STEP = 4
"""Heads are multiples of it: rows of a tile of a product."""


@functools.cache
def attention_library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be built or would be slow."""
    levels = levels_here()
    if not levels or levels[0].name in SLOW_LEVELS:
        return None
    built = native_library(SOURCE, "attention", "torch's operators are used")
    if built is None:
        return None
    return typed(built)


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions, on the threads of this process."""
    # Without types ctypes passes addresses as 32 bits.
    problem = (ctypes.c_void_p, ctypes.c_int)
    library.castalia_attention.argtypes = [*problem, *[ctypes.c_void_p] * 8]
    library.castalia_attention_backward.argtypes = [*problem, *[ctypes.c_void_p] * 9]
    lend_threads(library)
    return library


def fuses(dtype: str, head_dim: int) -> bool:
    """Whether the compiled attention computes heads of `head_dim` numbers of a dtype here.

    dtype  "float32" or "bfloat16"; anything else is torch's.
    """
    if dtype not in ("float32", "bfloat16") or head_dim % STEP or head_dim > WIDEST:
        return False
    return attention_library() is not None
