"""C++ sources of the package, built once for each machine, for use through ctypes. Needs no torch.

A build needs g++ or clang++; CASTALIA_CXX names another compiler, and `none` turns all builds off.
Every caller has the same computation in torch, for machines without a compiler.

The machine code is kept in a cache that only this user can write, under its SHA-256. It is loaded
from a copy in memory of the bytes that were checked, never from the file: a truncated library ends
the process with SIGBUS, and a foreign one runs as soon as it is loaded.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from castalia.core.files import cache_folder
from castalia.core.private_cache import PrivateCache

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
COMPILE_SECONDS = 180
"""A compiler that takes longer hangs."""
FOLDER = "native"
"""The part of the cache folder that holds the machine code."""


def native_library(source: Path, what: str) -> ctypes.CDLL | None:
    """The functions of `source`; None, with a warning about `what`, where they cannot be built.

    None without a warning where there is no compiler.
    """
    compiler = chosen_compiler()
    if compiler is None:
        return None
    try:
        return load(machine_code(source, compiler), source.stem)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        warnings.warn(
            f"compiling {what} failed, so torch's are used: {' '.join(reason)}", stacklevel=3
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


def machine_code(source: Path, compiler: str) -> bytes:
    """The library for this source, compiler and processor, compiled if the cache has no whole one.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    # All that decides about the machine code, so that a shared home serves several machines.
    decisive = "\n".join((source.read_text(), " ".join(FLAGS), version, processor()))
    key = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    try:
        cache = PrivateCache(cache_folder() / FOLDER)
    except PermissionError as error:
        # Also of a home in which nothing can be made, which is no reason to complain.
        if error.errno is None:
            notice = f"{error}, else {source.name} is compiled at every start"
            warnings.warn(notice, stacklevel=4)
        return compiled_code(source, compiler)
    except OSError:  # a read-only home, or none
        return compiled_code(source, compiler)
    with cache:
        code = cache.read(key)
        if code is None:
            code = compiled_code(source, compiler)
            with suppress(OSError):  # a full disk
                cache.write(key, code)
    return code


def load(code: bytes, name: str) -> ctypes.CDLL:
    """The functions of a library, from a copy of it that nothing else can change.

    Raises  OSError if it is no library of this system.
    """
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a kernel that forbids it
            return ctypes.CDLL(in_memory(code, name))
    with tempfile.TemporaryDirectory(prefix="castalia-") as folder:
        path = Path(folder) / f"{name}.so"
        path.write_bytes(code)
        return ctypes.CDLL(str(path))


def in_memory(code: bytes, name: str) -> str:
    """Path of a file in memory with this content, which can be read while the process lives."""
    # Never closed: the loader knows libraries by their paths, and would take the next one that gets
    # the number of this descriptor for this one.
    descriptor = os.memfd_create(name)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(code)
    return f"/proc/self/fd/{descriptor}"


def processor() -> str:
    """The lines of /proc/cpuinfo that decide what -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def compiled_code(source: Path, compiler: str, flags: Sequence[str] = FLAGS) -> bytes:
    """The library that the compiler makes of a source.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    with tempfile.TemporaryDirectory(prefix="castalia-") as folder:
        path = Path(folder) / f"{source.stem}.so"
        # A compiler without OpenMP, as Apple's is, builds the same code for one thread.
        for threads in (["-fopenmp"], []):
            command = [compiler, *flags, *threads, str(source), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        return path.read_bytes()
