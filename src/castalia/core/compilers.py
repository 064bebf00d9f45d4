"""Compilers of C++ and how they are called. Needs nothing but Python, as setup.py does.

A compiler is g++, clang++, or the clang of pip's package `ziglang` (`pip install
castalia[compiler]`), which brings all that it needs. CASTALIA_CXX names another, and `none` turns
compiling off. Sources use libc alone, so that a library runs wherever its libc is new enough.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from castalia.core.levels import Level

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    # A product and a sum in one instruction, as g++ does unasked.
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fno-exceptions",
    "-fno-rtti",
    # Vectors are passed between functions of one file only.
    "-Wno-psabi",
    "-pthread",
    # Loops that a level does not vectorize are no news.
    "-Wno-pass-failed",
    "-fPIC",
    "-shared",
    "-s",
)
COMPILERS = ("g++", "clang++", "c++")
ZIG = "zig"
OLDEST_GLIBC = {"x86_64": "2.17", "aarch64": "2.17"}
"""What zig's libraries need, which makes them manylinux2014 (PEP 599)."""
COMPILE_SECONDS = 900
"""A compiler that takes longer hangs. zig compiles its own C++ library first, and takes over 300 s
beside a busy machine's other work."""


def chosen_compiler() -> tuple[str, ...] | None:
    """The command of the compiler, without options; None where there is none."""
    wanted = os.environ.get("CASTALIA_CXX")
    if wanted == "none":
        return None
    for name in [wanted] if wanted else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return (path, "c++") if Path(path).name == ZIG else (path,)
    return zig_of_pip() if wanted in (None, "", ZIG) else None


def zig_of_pip() -> tuple[str, ...] | None:
    """The command of the package `ziglang`; None where it is not installed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).with_name(ZIG)
    return (str(path), "c++") if path.is_file() else None


def is_zig(compiler: tuple[str, ...]) -> bool:
    """Whether a command is zig's."""
    return Path(compiler[0]).name == ZIG


def version_of(compiler: tuple[str, ...]) -> str:
    """What a compiler says about itself.

    Raises  CalledProcessError if it fails; OSError if it is no program.
    """
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def zig_option(option: str) -> str:
    """An option as zig takes it, which knows no architecture of ARM, but features of processors:
    -march=armv8.2-a+dotprod is -mcpu=generic+v8_2a+dotprod.
    """
    prefix = "-march=arm"
    if not option.startswith(prefix):
        return option
    version, *features = option.removeprefix(prefix).split("+")
    version = version.replace(".", "_").replace("-", "")
    return "-mcpu=" + "+".join(("generic", version, *features))


def options(compiler: tuple[str, ...], level: Level) -> list[str]:
    """All options of a build but the names of files."""
    chosen = [*FLAGS, *level.flags, f'-DCASTALIA_LEVEL="{level.name}"']
    system = platform.system()
    if system == "Linux":
        # g++ names its own library, of which nothing is used.
        chosen.append("-Wl,--as-needed")
    if is_zig(compiler):
        chosen = [zig_option(option) for option in chosen]
        chosen.append("-nostdlib++")
        # Zig compiles for this processor where no target is named, whatever the flags say.
        machine = platform.machine()
        if system == "Linux" and machine in OLDEST_GLIBC:
            chosen += ["-target", f"{machine}-linux-gnu.{OLDEST_GLIBC[machine]}"]
    return chosen


def compiled_code(source: Path, compiler: tuple[str, ...], level: Level) -> bytes:
    """The library that a compiler makes of a source.

    Raises  CalledProcessError or TimeoutExpired if the compiler fails.
    """
    with tempfile.TemporaryDirectory(prefix="castalia-") as folder:
        path = Path(folder) / f"{source.stem}.so"
        command = [*compiler, *options(compiler, level), str(source), "-o", str(path)]
        subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True)
        return path.read_bytes()
