"""Instruction levels of a benchmark: one machine as it is, as an older one, and without a compiler.

The variables must stand before torch is imported, because its libraries read them as they load; a
benchmark that is given `--level` therefore starts itself again with them.
"""

import os
import shutil
import sys
from pathlib import Path

import torch

from castalia.core.compilers import zig_of_pip
from castalia.core.files import cache_folder
from castalia.machine import Machine, this_machine

LEVELS: dict[str, dict[str, str]] = {
    "as-is": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2",
        "CASTALIA_ISA": "x86-64-v3",
    },
    "vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "CT2_FORCE_CPU_ISA": "AVX512",
        "CASTALIA_ISA": "vnni",
    },
    "no-compiler": {"CASTALIA_CXX": "zig", "CXX": "none"},
    "torch-only": {"CASTALIA_CXX": "none", "CXX": "none"},
}
"""Name -> the variables of all processes of the benchmark. llama.cpp has none: it always takes all
instructions. vnni is an Ice Lake server, without instructions for bfloat16. no-compiler is a
machine without g++ or clang, where `make install` brings pip's `ziglang` for Castalia's libraries,
and torch.compile finds nothing. torch-only has no compiled library of Castalia at all."""
ENTERED = "CASTALIA_BENCHMARK_LEVEL"
"""Set in the process that runs at a level."""


def enter(level: str) -> None:
    """Go on at a level: in this process if it has the variables, else in its own place anew."""
    # torch.compile finds stored code by the graph alone: that of another level would write beyond
    # its buffers, or compute half of them.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / f"benchmark-{level}")
    if os.environ.get(ENTERED) == level:
        return
    values = LEVELS[level]
    if level == "no-compiler" and shutil.which("zig") is None and zig_of_pip() is None:
        raise SystemExit("--level no-compiler needs zig: pip install 'castalia[compiler]'")
    if values or ENTERED in os.environ:
        os.environ.update(values | {ENTERED: level})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU."""
    wanted = os.environ.get("CXX", "g++")
    return shutil.which(wanted) is not None


def results_file(folder: Path, name: str, level: str) -> Path:
    """Where the numbers of a level go."""
    return folder / f"{name}-{level}.json"


def instructions(machine: Machine) -> str:
    """The level and the instructions that kernels may use, in one line."""
    return " ".join((machine.level, *machine.instructions))


def describe_level(level: str) -> dict[str, object]:
    """The level, what kernels may use at it, and the measured rates, for the JSON of a run."""
    # Anew: what was kept may have been measured while the machine was busy.
    machine = this_machine(anew=True)
    return {
        "level": level,
        "instructions": instructions(machine),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_rate_gb": round(machine.memory_rate / 1e9, 1),
        "product_gflops": {
            dtype: {
                library: {rows: round(rate / 1e9, 1) for rows, rate in rates.items()}
                for library, rates in libraries.items()
            }
            for dtype, libraries in machine.rates.items()
        },
    }
