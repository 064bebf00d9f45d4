"""The compiled part of the native engine: step.cpp, built once for each machine, through ctypes.

The build needs a C++ compiler, g++ or clang++; CASTALIA_CXX names another, and `none` turns it off.
Without one the engine runs on torch's operators: the same numbers up to rounding, in slower steps.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castalia.core.files import cache_folder
from castalia.inference.native.packing import PANEL, Packed

SOURCE = Path(__file__).with_name("step.cpp")
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""Storages that the compiled kernels read, with their numbers in step.cpp."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
COMPILE_SECONDS = 180
"""A compiler that takes longer hangs."""

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
    """The compiled kernels; None, with one warning, where they cannot be built."""
    compiler = chosen_compiler()
    if compiler is None:
        return None
    try:
        path = cached_library(compiler)
        return declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        warnings.warn(
            f"compiling the native kernels failed, so torch's are used: {' '.join(reason)}",
            stacklevel=2,
        )
        return None


def chosen_compiler() -> str | None:
    """Path of the compiler, or None."""
    wanted = os.environ.get("CASTALIA_CXX")
    if wanted == "none":
        return None
    for name in [wanted] if wanted else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cached_library(compiler: str) -> Path:
    """The library for this source, compiler and processor, compiled if the cache lacks it."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    # All that decides about the machine code, so that a shared home serves several machines.
    key = "\n".join((SOURCE.read_text(), " ".join(FLAGS), version, processor()))
    name = f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    base = cache_folder()
    if (base / name).is_file():
        return base / name
    try:
        base.mkdir(parents=True, exist_ok=True)
        return compile_into(base, name, compiler)
    except OSError:  # a read-only home, or none
        return compile_into(Path(tempfile.mkdtemp(prefix="castalia-")), name, compiler)


def processor() -> str:
    """The lines of /proc/cpuinfo that decide what -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def compile_into(folder: Path, name: str, compiler: str, flags: Sequence[str] = FLAGS) -> Path:
    """Compile under a temporary name and rename: processes that start together load whole files.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        # A compiler without OpenMP, as Apple's is, builds the same code for one thread.
        for threads in (["-fopenmp"], []):
            command = [compiler, *flags, *threads, str(SOURCE), "-o", temporary]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(temporary, folder / name)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return folder / name


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    # Without them ctypes passes integers as 32 bits and cuts addresses.
    loaded.castalia_linear.argtypes = [Pointer, Pointer, Long, Pointer, Long, ctypes.c_int]
    loaded.castalia_forward.argtypes = [Pointer, Pointer, Pointer, ctypes.c_int]
    loaded.castalia_choose.argtypes = [Pointer, Pointer, Pointer, Pointer, ctypes.c_int]
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
