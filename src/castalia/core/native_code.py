"""C++ sources of the package as libraries for ctypes: from the wheel, or built once on the machine.

Each source is compiled for each level of instructions (castalia.core.levels), and the best one that
this machine has is loaded. A wheel carries all of them (see setup.py). Where the package has none,
as in an editable installation, this level alone is built at first use by a compiler of
castalia.core.compilers, or the best that the compiler knows. Every caller has the same computation
in torch or numpy, for machines with neither.

Libraries that are built here are kept in a cache that only this user can write, under their
SHA-256; castalia.core.prebuilt checks those of the wheel. A library is loaded from a copy in
memory of the bytes that were checked, never from the file: a truncated one ends the process with
SIGBUS, and a foreign one runs as soon as it is loaded.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from castalia.core.compilers import chosen_compiler, compiled_code, options, version_of
from castalia.core.files import cache_folder
from castalia.core.levels import Level, levels_here
from castalia.core.prebuilt import prebuilt_code, source_hash
from castalia.core.private_cache import PrivateCache

FOLDER = "native"
"""The part of the cache folder that holds the machine code."""


def native_library(source: Path, what: str, instead: str) -> ctypes.CDLL | None:
    """The functions of `source`; None, with a warning, where they cannot be built.

    Takes   what: the functions, in the warning. instead: what computes in their place, such as
            "torch's are used".

    None without a warning where there is neither a library in the package nor a compiler.
    Raises  ConfigError if CASTALIA_ISA names no level.
    """
    levels = levels_here()
    for level in levels:
        code = prebuilt_code(source, level)
        if code is not None:
            return load(code, source.stem)
    compiler = chosen_compiler()
    if compiler is None or not levels:
        return None
    reasons = []
    for level in levels:
        if not level.has_code:
            continue
        try:
            built = load(machine_code(source, compiler, level), source.stem)
        except subprocess.CalledProcessError as error:
            # A compiler that is older than the processor does not know its newest instructions.
            reasons.append(reason_of(error))
            continue
        except (OSError, subprocess.SubprocessError) as error:
            # No compiler that starts, or no time: another level would fail as well.
            reasons.append(str(error))
            break
        if reasons:
            notice = f"compiling {what} failed, so the level {level.name} is used: {reasons[0]}"
            warnings.warn(notice, stacklevel=3)
        return built
    warnings.warn(f"compiling {what} failed, so {instead}: {reasons[0]}", stacklevel=3)
    return None


def reason_of(error: subprocess.CalledProcessError) -> str:
    """The line in which a compiler says why it failed."""
    lines = ((error.stderr or "").strip() or str(error)).splitlines()
    # g++ goes on with notes, about options for warnings among others.
    return next((line for line in lines if "error" in line), lines[-1])


def machine_code(source: Path, compiler: tuple[str, ...], level: Level) -> bytes:
    """The library for this source, compiler and level, compiled if the cache has no whole one.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    # All that decides about the machine code, so that a shared home serves several machines.
    decisive = (source_hash(source), *options(compiler, level), version_of(compiler))
    key = hashlib.sha256("\n".join(decisive).encode()).hexdigest()[:16]
    try:
        cache = PrivateCache(cache_folder() / FOLDER)
    except PermissionError as error:
        # Also of a home in which nothing can be made, which is no reason to complain.
        if error.errno is None:
            notice = f"{error}, else {source.name} is compiled at every start"
            warnings.warn(notice, stacklevel=4)
        return compiled_code(source, compiler, level)
    except OSError:  # a read-only home, or none
        return compiled_code(source, compiler, level)
    with cache:
        code = cache.read(key)
        if code is None:
            code = compiled_code(source, compiler, level)
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


def lend_threads(library: ctypes.CDLL) -> None:
    """Let a library that includes threads.h compute on the threads of OpenMP that this process has.

    Without OpenMP, as before torch is imported, the library starts threads of its own.
    """
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if all(hasattr(process, name) for name in names):
        functions = [ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in names]
        library.castalia_lend_openmp(*functions)


def in_memory(code: bytes, name: str) -> str:
    """Path of a file in memory with this content, which can be read while the process lives."""
    # Never closed: the loader knows libraries by their paths, and would take the next one that gets
    # the number of this descriptor for this one.
    descriptor = os.memfd_create(name)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(code)
    return f"/proc/self/fd/{descriptor}"


def processor() -> str:
    """The lines of /proc/cpuinfo that say which processor this is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )
