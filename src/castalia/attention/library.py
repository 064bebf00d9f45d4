"""The compiled functions of attention, fused_attention.cpp, and what they compute."""

import ctypes
import functools
from pathlib import Path

from castalia.core.levels import levels_here
from castalia.core.native_code import lend_threads, native_library

SOURCE = Path(__file__).with_name("fused_attention.cpp")
SLOW_LEVELS = ("x86-64-v2",)
"""Without a product and sum in one instruction torch's products of matrices are faster."""
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
    built = native_library(SOURCE, "attention", "attention by torch's operators is used")
    if built is None:
        return None
    # Without types ctypes passes addresses as 32 bits.
    pointer = ctypes.c_void_p
    built.castalia_attention.argtypes = [pointer, ctypes.c_int] + [pointer] * 8
    built.castalia_attention_backward.argtypes = [pointer, ctypes.c_int] + [pointer] * 9
    built.castalia_attention.restype = None
    built.castalia_attention_backward.restype = None
    lend_threads(built)
    return built


def fuses(dtype: str, head_dim: int) -> bool:
    """Whether the compiled attention computes heads of `head_dim` numbers of a dtype here.

    dtype  "float32" or "bfloat16"; anything else is torch's.
    """
    if dtype not in ("float32", "bfloat16") or head_dim % STEP or head_dim > WIDEST:
        return False
    return attention_library() is not None
