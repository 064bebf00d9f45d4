"""C++ sources of the package, built once for each machine, for use through ctypes. Needs no torch.

A build needs g++ or clang++; CASTALIA_CXX names another compiler, and `none` turns all builds off.
Every caller has the same computation in torch, for machines without a compiler.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from castalia.core.files import cache_folder

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
COMPILE_SECONDS = 180
"""A compiler that takes longer hangs."""


def native_library(source: Path, what: str) -> ctypes.CDLL | None:
    """The functions of `source`; None, with a warning about `what`, where they cannot be built.

    None without a warning where there is no compiler.
    """
    compiler = chosen_compiler()
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(cached_library(source, compiler)))
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


def cached_library(source: Path, compiler: str) -> Path:
    """The library for this source, compiler and processor, compiled if the cache lacks it."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    # All that decides about the machine code, so that a shared home serves several machines.
    key = "\n".join((source.read_text(), " ".join(FLAGS), version, processor()))
    name = f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    base = cache_folder()
    if (base / name).is_file():
        return base / name
    try:
        base.mkdir(parents=True, exist_ok=True)
        return compile_into(base, name, source, compiler)
    except OSError:  # a read-only home, or none
        return compile_into(Path(tempfile.mkdtemp(prefix="castalia-")), name, source, compiler)


def processor() -> str:
    """The lines of /proc/cpuinfo that decide what -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )


def compile_into(
    folder: Path, name: str, source: Path, compiler: str, flags: Sequence[str] = FLAGS
) -> Path:
    """Compile under a temporary name and rename: processes that start together load whole files.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        # A compiler without OpenMP, as Apple's is, builds the same code for one thread.
        for threads in (["-fopenmp"], []):
            command = [compiler, *flags, *threads, str(source), "-o", temporary]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(temporary, folder / name)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return folder / name
