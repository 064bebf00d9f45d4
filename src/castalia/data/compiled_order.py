"""The slow loops of orders in C++, order.cpp: numpy's shuffle, and where rows begin.

The results are numpy's, number by number; numpy itself is used where there is no library.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castalia.core.native_code import native_library

SOURCE = Path(__file__).with_name("order.cpp")
LEAST = 1 << 20
"""Numbers below which numpy is fast enough: a tenth of a second, less than a build takes."""
DRAWS = 1 << 18
"""Random numbers drawn at a time: 1 MiB, which stays in a core's second cache."""
LARGEST = (1 << 32) - 1
"""Most numbers that a shuffle has 32-bit draws for."""


@functools.cache
def order_library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be built."""
    built = native_library(SOURCE, "the shuffles of orders", "numpy's are used")
    if built is None:
        return None
    # Without types ctypes passes integers as 32 bits and cuts addresses.
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    built.castalia_shuffle.argtypes = [pointer, pointer, pointer, number]
    built.castalia_shuffle.restype = number
    for place in (built.castalia_place_int32, built.castalia_place_int64):
        place.argtypes = [pointer, pointer, number, number, number, pointer]
        place.restype = number
    return built


def library_for(count: int) -> ctypes.CDLL | None:
    """The library, for an order of so many numbers."""
    return order_library() if LEAST <= count <= LARGEST else None


def shuffle(random: np.random.RandomState, values: NDArray[Any]) -> None:
    """`random.shuffle(values)`, in place; the generator goes on as after it.

    Shapes  values (n,), of any dtype; those of 4 bytes are shuffled by the library.
    """
    library = library_for(len(values))
    if library is None or values.itemsize != 4 or not values.flags.c_contiguous:
        random.shuffle(values)
        return
    top = ctypes.c_int64(len(values) - 1)
    while top.value > 0:
        before = random.get_state(legacy=False)
        draws = random.randint(0, 1 << 32, size=DRAWS, dtype=np.uint32)
        used = library.castalia_shuffle(
            values.ctypes.data, ctypes.byref(top), draws.ctypes.data, len(draws)
        )
    # The last draws were too many: again from their beginning, as many as were used.
    random.set_state(before)
    random.randint(0, 1 << 32, size=used, dtype=np.uint32)


def place_rows_compiled(
    sizes: NDArray[np.integer],
    doc_idx: NDArray[np.int32],
    seq_length: int,
    starts: NDArray[np.int32] | NDArray[np.int64],
) -> bool:
    """Fill `starts` as `place_rows` does, except for its first row; False if numpy must do it.

    Shapes  sizes (N,), doc_idx (D,), starts (rows + 1, 2), all contiguous.
    """
    library = library_for(max(len(doc_idx), len(starts)))
    arrays = (sizes, doc_idx)
    if library is None or any(a.dtype != np.int32 or not a.flags.c_contiguous for a in arrays):
        return False
    # numpy counts negative numbers from the back, and refuses those beyond the end.
    if doc_idx.min() < 0 or doc_idx.max() >= len(sizes):
        return False
    wide = starts.dtype == np.int64
    place = library.castalia_place_int64 if wide else library.castalia_place_int32
    rows = len(starts) - 1
    addresses = (sizes.ctypes.data, doc_idx.ctypes.data)
    written = place(*addresses, len(doc_idx), seq_length, rows, starts.ctypes.data)
    assert written == rows + 1, (written, rows)
    return True
