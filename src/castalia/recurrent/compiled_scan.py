"""The scan of Mamba in C++, selective_scan.cpp: on a CPU, in fp32, without a tensor of all states.

Shapes as in selective_scan.py: B batch, T tokens, E channels, N numbers that a channel remembers.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from castalia.core.native_code import lend_threads, native_library

SOURCE = Path(__file__).with_name("selective_scan.cpp")
CHUNK = 32
"""Tokens between two states that are kept for the backward; those of a chunk stay in a core's
second cache."""


@functools.cache
def scan_library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be built."""
    built = native_library(SOURCE, "the scan of Mamba", "the scan in torch is used")
    if built is None:
        return None
    # Without types ctypes passes integers as 32 bits and cuts addresses.
    pointer = ctypes.c_void_p
    built.castalia_scan.argtypes = [pointer] * 11 + [ctypes.c_int]
    built.castalia_scan_backward.argtypes = [pointer] * 14 + [ctypes.c_int]
    built.castalia_scan_parts.restype = ctypes.c_int64
    lend_threads(built)
    return built


def library_for(A: Tensor) -> ctypes.CDLL | None:
    """The library, for a scan that it computes."""
    if A.device.type != "cpu" or A.dtype != torch.float32:
        return None
    return scan_library()


class Arguments:
    """The inputs of a scan as the library reads them; valid while this object lives.

    Raises  ValueError for a tensor of another shape than the others say, or on another device: the
            library would read memory that is not the tensor's.
    """

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        starts: Tensor | None,
        chunk: int,
    ) -> None:
        size, T, E = u.shape
        N = A.shape[-1]
        require("u", u, (size, T, E))
        require("dt", dt, (size, T, E))
        require("A", A, (E, N))
        require("B", B, (size, T, N))
        require("C", C, (size, T, N))
        require("starts", starts, (size, T))
        self.tensors = [x.to(torch.float32).contiguous() for x in (u, dt, A, B, C)]
        self.starts = None if starts is None else starts.to(torch.uint8).contiguous()
        self.sizes = (ctypes.c_int64 * 5)(size, T, E, N, chunk)

    @property
    def addresses(self) -> list[object]:
        """The first arguments of both functions."""
        starts = None if self.starts is None else self.starts.data_ptr()
        return [ctypes.addressof(self.sizes), *(x.data_ptr() for x in self.tensors), starts]


def require(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises  ValueError if a tensor that is there is not on the CPU in this shape."""
    if x is not None and (x.shape != shape or x.device.type != "cpu"):
        raise ValueError(
            f"the scan of Mamba got {name} of shape {tuple(x.shape)} on {x.device}, expected"
            f" {shape} on the CPU"
        )


def compiled_scan(
    library: ctypes.CDLL,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    h: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `selective_scan.scan_chunks`."""
    inputs = Arguments(u, dt, A, B, C, starts, chunk)
    size, T, _ = u.shape
    y = torch.empty(u.shape)
    borders = torch.empty(-(-T // chunk), size, *A.shape)
    last = torch.empty(size, *A.shape)
    require("h", h, (size, *A.shape))
    before = None if h is None else h.to(torch.float32).contiguous()
    library.castalia_scan(
        *inputs.addresses,
        None if before is None else before.data_ptr(),
        *(x.data_ptr() for x in (y, last, borders)),
        torch.get_num_threads(),
    )
    return y, borders, last


def compiled_backward(
    library: ctypes.CDLL,
    dy: Tensor,
    borders: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `selective_scan.scan_backward`."""
    inputs = Arguments(u, dt, A, B, C, starts, chunk)
    size, T, E = u.shape
    require("dy", dy, (size, T, E))
    require("borders", borders, (-(-T // chunk), size, *A.shape))
    dy = dy.to(torch.float32).contiguous()
    borders = borders.contiguous()
    du = torch.empty(u.shape)
    ddt = torch.empty(u.shape)
    dA = torch.empty(size, *A.shape)
    # Of each part of the channels, added up here in one order whatever the number of threads.
    parts = (size, library.castalia_scan_parts(), T, A.shape[1])
    dB = torch.empty(parts)
    dC = torch.empty(parts)
    outputs = (dy, borders, du, ddt, dA, dB, dC)
    library.castalia_scan_backward(
        *inputs.addresses, *(x.data_ptr() for x in outputs), torch.get_num_threads()
    )
    return (
        du.to(u.dtype),
        ddt.to(dt.dtype),
        dA.sum(0),
        dB.sum(1).to(B.dtype),
        dC.sum(1).to(C.dtype),
    )
